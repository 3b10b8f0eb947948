"""What methods of sparse attention share: the method, and plans in place."""
