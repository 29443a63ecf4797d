//! What joins the ranks of a divided network: `collective.cu`, or NCCL, as a TensorRT layer.
//!
//! Input and output have one shape. `Sum`: the output is the sum of all ranks' inputs, equal in every bit on each of them.
//! `Gather`: rows `[batch, ranks * features]` of which a rank's input has its own features first; the output has those of
//! all ranks side by side.
use super::communicator::{Communicator, Work};
use super::kernel::{Compiler, Kernels};
use super::nvrtc::CompileError;
use super::{local, nccl};
use crate::lower::data_type;
use cudarc::driver::result;
use graphs::DType;
use serde::{Deserialize, Serialize};
use std::ffi::CStr;
use std::sync::Arc;
use tensorrt_sys::{Plugin, PluginCall, PluginOutput, Signature};

const SOURCE: &str = include_str!("collective.cu");

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Join {
    Sum,
    Gather,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CollectiveShape {
    pub join: Join,
    pub dtype: DType,
    pub ranks: usize,
}

/// Where a layer stands.
enum Place {
    /// In a network that is being built: other ranks do not exist, and TensorRT may run it to time it.
    Building,
    /// In an engine that was loaded, with the other ranks or without.
    Loaded(Option<Arc<Communicator>>),
}

pub struct CollectivePlugin {
    shape: CollectiveShape,
    kernels: Kernels,
    place: Place,
}

impl CollectivePlugin {
    pub const NAME: &'static CStr = c"TrtvlmCollective";
    pub const KERNELS: [&'static str; 3] = [local::KERNEL, nccl::GATHER, nccl::JOIN];

    /// # Errors
    /// The compiler's log.
    pub fn new(shape: CollectiveShape, compiler: &Compiler) -> Result<CollectivePlugin, CompileError> {
        let kind = match shape.dtype {
            DType::Float16 => 1,
            DType::Bfloat16 => 2,
            _ => 0,
        };
        let code = compiler.compile("collective.cu", SOURCE, vec![format!("-DTYPE={kind}")])?;
        Ok(CollectivePlugin { shape, kernels: Kernels::new(code), place: Place::Building })
    }

    pub(super) fn create(state: &[u8]) -> Result<Box<dyn Plugin>, String> {
        let (shape, kernels) = Kernels::restore(state)?;
        let place = Place::Loaded(Communicator::of_the_engine_being_loaded());
        Ok(Box::new(CollectivePlugin { shape, kernels, place }))
    }
}

impl Plugin for CollectivePlugin {
    fn name(&self) -> &'static CStr {
        CollectivePlugin::NAME
    }

    fn signature(&self) -> Signature {
        let dtype = data_type(self.shape.dtype);
        Signature { inputs: vec![dtype], outputs: vec![PluginOutput { dtype, like: 0, in_place: false }] }
    }

    fn state(&self) -> Vec<u8> {
        self.kernels.store(&self.shape)
    }

    /// Room for the parts of all ranks, and this rank's, as one piece each.
    fn workspace(&self, inputs: &[Vec<i64>]) -> usize {
        let count = |shape: &Vec<i64>| shape.iter().map(|&size| usize::try_from(size).unwrap_or(0)).product();
        let elements = inputs.first().map_or(0, count);
        match self.shape.join {
            Join::Sum => 0,
            Join::Gather => self.shape.dtype.bytes(2 * elements),
        }
    }

    fn enqueue(&self, call: &PluginCall<'_>) -> Result<(), String> {
        let ([input], [output]) = (call.inputs, call.outputs) else { return Err("it has other tensors".into()) };
        let sizes: Result<Vec<usize>, _> = input.shape.iter().map(|&size| usize::try_from(size)).collect();
        let sizes = sizes.map_err(|error| error.to_string())?;
        let (elements, ranks) = (sizes.iter().product::<usize>(), self.shape.ranks.max(1));
        let communicator = match &self.place {
            Place::Building => {
                let bytes = self.shape.dtype.bytes(elements);
                // SAFETY: input and output have the same shape and type.
                let copied =
                    unsafe { result::memcpy_dtod_async(output.address, input.address, bytes, call.stream.cast()) };
                return copied.map_err(|error| error.to_string());
            }
            Place::Loaded(None) => return Err("it is one rank of several, the others do not run".into()),
            Place::Loaded(Some(communicator)) => communicator,
        };
        if communicator.ranks != ranks {
            return Err(format!("it was built for {ranks} ranks, there are {}", communicator.ranks));
        }
        if elements == 0 {
            return Ok(());
        }
        let (count, width) = match self.shape.join {
            Join::Sum => (elements, 0),
            Join::Gather => (elements / ranks, sizes.last().copied().unwrap_or(0) / ranks),
        };
        let work = Work { kernels: &self.kernels, dtype: self.shape.dtype, count, width };
        communicator.join(&work, call)
    }
}
