"""`hf-rsheat bench`: what is measured, and how."""
