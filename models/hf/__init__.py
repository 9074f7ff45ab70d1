"""What an export carries: `modeling_nsa.py` is copied into every exported folder."""
