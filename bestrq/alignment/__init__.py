"""Word times by forced alignment with a CTC recogniser."""
