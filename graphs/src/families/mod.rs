//! Model families: each file writes the layers of one architecture in the DSL.
pub mod clip;
pub mod llama;
pub mod projector;
