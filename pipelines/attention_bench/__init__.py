"""`dittune bench attention`: sparse attention on the shapes of real models, gated and timed."""
