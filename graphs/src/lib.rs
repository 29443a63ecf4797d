//! Networks before any target: the IR, the DSL that writes it, the model families, the verifier and the CPU interpreter.
//! No input or output, no TensorRT.
mod dtype;
mod weight;

pub use dtype::DType;
pub use weight::{Format, Weight};
