"""Who proposes candidates, and who remembers them."""
