"""Programs for the development of this package; none of them is installed with it."""
