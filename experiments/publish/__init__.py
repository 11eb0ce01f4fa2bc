"""What is published of rows: reports, the README's numbers, the reproduction guide."""
