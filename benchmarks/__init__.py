"""What the numbers in the documentation are measured with: expert pairs that anyone can rebuild, and the tables."""
