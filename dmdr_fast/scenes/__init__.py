"""The embedded text-to-image data: two coloured digits on a canvas, described in English."""
