"""Configuration files, composed by Hydra; found here from a checkout and from an installed package alike."""
