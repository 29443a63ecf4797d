//! Calibration on a GPU. Values of all samples of a part lie there one behind the other from node to node, so that each
//! weight goes up once and only statistics come down; what a GPU kernel is missing for is computed on the CPU.
mod machine;
mod product;
mod sweep;
mod value;

use crate::backend::BackendError;
use crate::device::DeviceError;
use crate::plugins::CompileError;
pub use machine::{KERNELS, Machine};
pub(super) use sweep::sweep;
use thiserror::Error;
pub(super) use value::Value;

#[derive(Debug, Error)]
pub enum GpuError {
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error(transparent)]
    Compile(#[from] CompileError),
    #[error("no cuBLASLt library was found (libcublasLt.so)")]
    NoBlas,
    #[error("{0}")]
    Blas(String),
}

impl GpuError {
    pub fn hint(&self) -> Option<String> {
        match self {
            GpuError::Device(error) => error.hint(),
            GpuError::Backend(error) => error.hint(),
            GpuError::NoBlas => Some(
                "it comes with the CUDA toolkit: put its folder in LD_LIBRARY_PATH, as /usr/local/cuda/lib64; or give \
                 `--device cpu`"
                    .into(),
            ),
            GpuError::Compile(_) | GpuError::Blas(_) => None,
        }
    }
}
