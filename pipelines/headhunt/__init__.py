"""HeadHunter: which heads to perturb, found by trying them."""
