//! quantization recipes, round to nearest, packing, materializing
