//! Model families: each file writes the layers of one architecture in the DSL.
pub mod clip;
mod cross;
mod decoder;
pub mod donut_swin;
pub mod eva;
pub mod llama;
pub mod mbart;
pub mod opt;
pub mod projector;
pub mod qformer;
pub mod siglip;
pub mod t5;
pub mod vila_projector;
pub mod vit;
