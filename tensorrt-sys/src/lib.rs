//! TensorRT through its C++ virtual tables: no headers, no C++ compiler, nothing linked.
//!
//! One binary drives TensorRT-RTX 1.5 on and TensorRT 10 and 11; slots and enum values are looked up by the version of
//! the library that was loaded.
//!
//! ```no_run
//! use tensorrt_sys::{BuildOptions, Builder, DataType, ElementWiseOperation, Library};
//! use std::ops::ControlFlow;
//!
//! let library = Library::open("libtensorrt_rtx.so.1".as_ref())?;
//! let builder = Builder::new(library)?;
//! let one = 1.0f32.to_le_bytes();
//! let network = builder.network("test")?;
//! let x = network.input("x", DataType::Float, &[8, 1])?;
//! let y = network.elementwise("y", x, network.constant("one", DataType::Float, &[1, 1], &one)?, ElementWiseOperation::Sum)?;
//! network.mark_output("y", y)?;
//! let mut plan = Vec::new();
//! let options = BuildOptions { compute_capabilities: vec![89], ..BuildOptions::default() };
//! builder.build_to(&network, &options, &mut plan, &mut |_| ControlFlow::Continue(()))?;
//! # Ok::<(), tensorrt_sys::Error>(())
//! ```
//! A constant must outlive the network it is in:
//! ```compile_fail
//! # use tensorrt_sys::{Builder, DataType, Network};
//! # fn network(builder: &Builder) -> tensorrt_sys::Result<()> {
//! let network = builder.network("test")?;
//! let bytes = vec![0; 4];
//! network.constant("c", DataType::Float, &[1], &bytes)?;
//! drop(bytes);
//! builder.build_to(&network, &Default::default(), &mut Vec::new(), &mut |_| std::ops::ControlFlow::Continue(()))?;
//! # Ok(())
//! # }
//! ```
#![expect(unsafe_code, reason = "C++ objects are called through raw tables; each block says why it holds")]
mod abi;
mod builder;
mod collectives;
mod enums;
mod error;
mod layers;
mod library;
mod log;
mod mapped;
mod network;
mod plugin;
mod process;
mod progress;
mod runtime;
mod slots;
mod stream;
#[cfg(test)]
mod tables;

pub use builder::{BuildOptions, Builder, ShapeRange};
pub use enums::*;
pub use error::{Error, Result};
pub use layers::AttentionOptions;
pub use library::{Family, Library};
pub use log::Severity;
pub use mapped::MappedFile;
pub use network::{Network, Tensor};
pub use plugin::{Create, Plugin, PluginCall, PluginOutput, PluginTensor, Signature};
pub use process::{die_with_parent, steady};
pub use progress::Progress;
pub use runtime::{Context, Engine, EngineTensor};
pub use stream::BuildSummary;
