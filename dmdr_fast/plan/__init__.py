"""The planner: memory, cost and time of a run, without weights and without a GPU.

``dmdr-plan --config FILE --gpus 8 --gpu-memory 80``. One update of the algorithm itself runs on meta
tensors while the bytes that live are counted (``trace``); what ZeRO keeps is arithmetic (``zero``).
"""
