"""Foundation: attention and its layout. Imports torch (and triton) only."""
