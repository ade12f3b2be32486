"""Scripts that compose pgjax, and the black-box rewards that they train on."""
