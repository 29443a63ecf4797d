//! The greedy choice on the device: `greedy.cu` as a TensorRT layer, so that a decode step needs nothing from the host.
//!
//! Inputs: logits float32 `[batch, vocab]`, sequence lengths int32 `[batch]`. Outputs int32 `[batch]`: the place of the
//! largest logit, the first of equals, and the sequence lengths after the next step.
use super::kernel::{Compiler, Kernels, Launch};
use super::nvrtc::CompileError;
use std::ffi::{CStr, c_void};
use tensorrt_sys::{DataType, Plugin, PluginCall, PluginOutput, Signature};

const SOURCE: &str = include_str!("greedy.cu");

pub struct GreedyPlugin {
    kernels: Kernels,
}

impl GreedyPlugin {
    pub const NAME: &'static CStr = c"TrtvlmGreedy";
    pub const KERNELS: [&'static str; 1] = ["choose"];

    /// # Errors
    /// The compiler's log.
    pub fn new(compiler: &Compiler) -> Result<GreedyPlugin, CompileError> {
        Ok(GreedyPlugin { kernels: Kernels::new(compiler.compile("greedy.cu", SOURCE, Vec::new())?) })
    }

    pub(super) fn create(state: &[u8]) -> Result<Box<dyn Plugin>, String> {
        let ((), kernels) = Kernels::restore(state)?;
        Ok(Box::new(GreedyPlugin { kernels }))
    }
}

impl Plugin for GreedyPlugin {
    fn name(&self) -> &'static CStr {
        GreedyPlugin::NAME
    }

    fn signature(&self) -> Signature {
        let output = PluginOutput { dtype: DataType::Int32, like: 1, in_place: false };
        Signature { inputs: vec![DataType::Float, DataType::Int32], outputs: vec![output; 2] }
    }

    fn state(&self) -> Vec<u8> {
        self.kernels.store(&())
    }

    fn workspace(&self, _: &[Vec<i64>]) -> usize {
        0
    }

    fn enqueue(&self, call: &PluginCall<'_>) -> Result<(), String> {
        let ([logits, sequence], [token, next]) = (call.inputs, call.outputs) else {
            return Err("it has other inputs or outputs".into());
        };
        let &[batch, vocab] = &logits.shape[..] else { return Err("the logits have another shape".into()) };
        let mut vocab = i32::try_from(vocab).map_err(|error| error.to_string())?;
        let mut at = [logits.address, sequence.address, token.address, next.address];
        let mut arguments: Vec<*mut c_void> = at.iter_mut().map(|address| std::ptr::from_mut(address).cast()).collect();
        arguments.push((&raw mut vocab).cast());
        let launch = Launch { grid: [batch.max(0) as usize, 1, 1], threads: 1024, shared: 0 };
        // SAFETY: the arguments are those of the kernel in greedy.cu, of the shapes that TensorRT checked.
        unsafe { self.kernels.launch(GreedyPlugin::KERNELS[0], launch, call.stream, &mut arguments) }
    }
}
