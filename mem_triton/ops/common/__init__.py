"""What several ops share. It imports none of them."""
