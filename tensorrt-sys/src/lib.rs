//! TensorRT called through its virtual tables, loaded at run time
