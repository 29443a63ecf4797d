//! Layers of ours for TensorRT 10 and later: Rust around CUDA C++ kernels, which lie beside them and are compiled when an
//! engine is built. The engine carries the machine code and needs no compiler to run.
#![expect(unsafe_code, reason = "kernels are compiled and started through C interfaces; each block says why it holds")]
mod attention;
mod collective;
mod communicator;
mod greedy;
mod kernel;
mod local;
mod nccl;
mod nvrtc;

pub use attention::{AttentionPlugin, AttentionShape, LARGEST_HEAD};
pub use collective::{CollectivePlugin, CollectiveShape, Join};
pub use communicator::{Communicator, CommunicatorError};
pub use greedy::GreedyPlugin;
pub use kernel::Compiler;
pub(crate) use kernel::{Kernels, Launch};
pub use nccl::UniqueId;
pub use nvrtc::{CompileError, Nvrtc};

/// Makes every plugin known to a TensorRT library; needed before engines are built or loaded.
///
/// # Errors
/// A library that takes no plugins.
pub fn register(library: &'static tensorrt_sys::Library) -> tensorrt_sys::Result<()> {
    library.register(AttentionPlugin::NAME, AttentionPlugin::create)?;
    library.register(CollectivePlugin::NAME, CollectivePlugin::create)?;
    library.register(GreedyPlugin::NAME, GreedyPlugin::create)
}
