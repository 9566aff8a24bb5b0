"""Generated street scenes: 19 long-tailed classes, objects near and far. Needs numpy and Pillow alone."""
