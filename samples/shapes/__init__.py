"""The Shapes world: a small set of drawn scenes with exact captions and an exact scorer."""
