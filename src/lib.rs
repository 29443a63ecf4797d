//! trtvlm compiles vision-language checkpoints into TensorRT engines.
