"""Any backbone of timm, as a teacher."""
