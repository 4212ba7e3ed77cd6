"""The data a run draws on: scikit-learn's digits, folders of images, class labels."""
