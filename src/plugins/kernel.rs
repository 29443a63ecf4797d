//! Kernels of a plugin or of calibration: their machine code, where it is kept, and how it is started.
use super::nvrtc::{CompileError, Nvrtc};
use cudarc::driver::{result, sys};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::ffi::{CString, c_void};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};

/// Compiles kernels for one GPU, each combination of source and options once.
pub struct Compiler {
    nvrtc: Nvrtc,
    gpu: u32,
    done: Mutex<BTreeMap<Recipe, Arc<[u8]>>>,
}

/// A source's name and its options.
type Recipe = (&'static str, Vec<String>);

impl Compiler {
    /// `gpu` is a compute capability, 90 for sm90.
    ///
    /// # Errors
    /// A library that cannot be loaded.
    pub fn new(library: &Path, gpu: u32) -> Result<Compiler, CompileError> {
        Ok(Compiler { nvrtc: Nvrtc::open(library)?, gpu, done: Mutex::default() })
    }

    /// # Errors
    /// The compiler's log.
    pub fn compile(&self, name: &'static str, source: &str, options: Vec<String>) -> Result<Arc<[u8]>, CompileError> {
        let mut done = self.done.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(code) = done.get(&(name, options.clone())) {
            return Ok(Arc::clone(code));
        }
        let code: Arc<[u8]> = self.nvrtc.compile(name, source, &options, self.gpu)?.into();
        done.insert((name, options), Arc::clone(&code));
        Ok(code)
    }
}

/// Machine code, loaded into the GPU at its first use.
pub(crate) struct Kernels {
    code: Arc<[u8]>,
    module: OnceLock<Result<Module, String>>,
}

struct Module(sys::CUmodule);

// SAFETY: a module may be used from any thread that has its context.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: nothing started from the module is still running when its engine goes. A context that is gone has
        // taken the module with it, which is the error that is left unread here.
        let _ = unsafe { result::module::unload(self.0) };
    }
}

/// How a kernel is started: blocks, threads of a block, bytes of dynamic shared memory.
#[derive(Clone, Copy)]
pub(crate) struct Launch {
    pub(crate) grid: [usize; 3],
    pub(crate) threads: u32,
    pub(crate) shared: usize,
}

impl Kernels {
    pub(crate) fn new(code: Arc<[u8]>) -> Kernels {
        Kernels { code, module: OnceLock::new() }
    }

    /// Parameters and machine code as one piece, for the engine.
    pub(super) fn store(&self, parameters: &impl Serialize) -> Vec<u8> {
        let text = serde_json::to_vec(parameters).unwrap_or_default();
        let length = (text.len() as u64).to_le_bytes();
        [&length[..], &text, &self.code].concat()
    }

    /// # Errors
    /// Bytes that [`Kernels::store`] did not write.
    pub(super) fn restore<P: DeserializeOwned>(state: &[u8]) -> Result<(P, Kernels), String> {
        let damaged = || "its state in the engine is damaged".to_owned();
        let (length, rest) = state.split_first_chunk::<8>().ok_or_else(damaged)?;
        let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| damaged())?;
        let (text, code) = rest.split_at_checked(length).ok_or_else(damaged)?;
        let parameters = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        Ok((parameters, Kernels::new(code.into())))
    }

    fn module(&self) -> Result<sys::CUmodule, String> {
        let load = || {
            // SAFETY: the code is a cubin that NVRTC made; the driver checks that it is for this GPU.
            let module = unsafe { result::module::load_data(self.code.as_ptr().cast()) };
            module.map(Module).map_err(|error| format!("the kernels cannot be loaded: {error}"))
        };
        self.module.get_or_init(load).as_ref().map(|module| module.0).map_err(Clone::clone)
    }

    /// Puts a kernel on a stream; its name in the source has the prefix `trtvlm_`, by which profilers can pick ours.
    ///
    /// # Safety
    /// `arguments` point at values of the types that the kernel takes, in its order; addresses among them are device
    /// memory of the sizes that it touches.
    ///
    /// # Errors
    /// What the driver says.
    pub(crate) unsafe fn launch(
        &self,
        name: &str,
        launch: Launch,
        stream: *mut c_void,
        arguments: &mut [*mut c_void],
    ) -> Result<(), String> {
        let failed = |error: result::DriverError| format!("kernel `{name}`: {error}");
        let module = self.module()?;
        let title = CString::new(format!("trtvlm_{name}")).map_err(|error| error.to_string())?;
        let size = |place: usize| u32::try_from(launch.grid[place]).map_err(|_| format!("`{name}`: too many blocks"));
        let grid = (size(0)?, size(1)?, size(2)?);
        if grid.0 == 0 || grid.1 == 0 || grid.2 == 0 {
            return Ok(());
        }
        // SAFETY: the module is loaded; the rest is the caller's promise.
        unsafe {
            let function = result::module::get_function(module, title).map_err(failed)?;
            if launch.shared > STATIC_LIMIT {
                let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                result::function::set_function_attribute(function, attribute, launch.shared as i32).map_err(failed)?;
            }
            let threads = (launch.threads, 1, 1);
            result::launch_kernel(function, grid, threads, launch.shared as u32, stream.cast(), arguments)
                .map_err(failed)
        }
    }
}

/// Shared memory that a block gets without asking, in bytes.
const STATIC_LIMIT: usize = 48 << 10;
