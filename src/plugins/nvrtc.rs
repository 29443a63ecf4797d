//! NVRTC, NVIDIA's compiler of CUDA C++ as a library, loaded by its path. It needs no GPU.
//!
//! cudarc's own loader knows library names up to CUDA 12 only, and gives PTX where an engine should carry machine code.
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use thiserror::Error;

#[derive(Debug, Error)]
pub enum CompileError {
    #[error("cannot load NVRTC from `{path}`", path = .path.display())]
    Load { path: PathBuf, source: libloading::Error },
    #[error("NVRTC cannot compile `{name}` for sm{gpu}: {log}")]
    Compile { name: &'static str, gpu: u32, log: String },
    #[error("the source or an option of `{name}` holds a zero byte")]
    Zero { name: &'static str },
}

type Program = *mut c_void;

/// The library; its symbols are looked up as they are called.
pub struct Nvrtc {
    library: Library,
    path: PathBuf,
}

impl Nvrtc {
    /// # Errors
    /// A file that is no library.
    pub fn open(path: &Path) -> Result<Nvrtc, CompileError> {
        // SAFETY: loading runs the library's initializers, which do nothing but set it up.
        let load = |path: &Path| unsafe { Library::new(path) };
        // The part with CUDA's built-in functions lies beside it and is found only if it is there already.
        let beside = path.parent().and_then(|folder| std::fs::read_dir(folder).ok());
        for entry in beside.into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with("libnvrtc-builtins.so") {
                let _ = load(&entry.path()).map(std::mem::forget);
            }
        }
        let library = load(path).map_err(|source| CompileError::Load { path: path.into(), source })?;
        Ok(Nvrtc { library, path: path.into() })
    }

    fn symbol<T: Copy>(&self, name: &str) -> Result<T, CompileError> {
        // SAFETY: each caller names the type that nvrtc.h declares for the symbol, the same in every version.
        let found = unsafe { self.library.get::<T>(name.as_bytes()).map(|symbol| *symbol) };
        found.map_err(|source| CompileError::Load { path: self.path.clone(), source })
    }

    /// `NVRTC 12.8`.
    ///
    /// # Errors
    /// A library that is no NVRTC.
    pub fn version(&self) -> Result<String, CompileError> {
        let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int = self.symbol("nvrtcVersion")?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both point at room for one number.
        unsafe { version(&raw mut major, &raw mut minor) };
        Ok(format!("NVRTC {major}.{minor}"))
    }

    /// Machine code (a cubin) of a source for GPUs of one compute capability.
    ///
    /// # Errors
    /// The compiler's log.
    pub fn compile(
        &self,
        name: &'static str,
        source: &str,
        options: &[String],
        gpu: u32,
    ) -> Result<Vec<u8>, CompileError> {
        let zero = |_| CompileError::Zero { name };
        let (source, title) = (CString::new(source).map_err(zero)?, CString::new(name).map_err(zero)?);
        let target = format!("--gpu-architecture=sm_{gpu}");
        let options: Result<Vec<CString>, _> =
            options.iter().cloned().chain([target, "--std=c++17".into()]).map(CString::new).collect();
        let options = options.map_err(zero)?;
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        type Make = unsafe extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> c_int;
        let make: Make = self.symbol("nvrtcCreateProgram")?;
        let run: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int =
            self.symbol("nvrtcCompileProgram")?;
        let destroy: unsafe extern "C" fn(*mut Program) -> c_int = self.symbol("nvrtcDestroyProgram")?;
        let failed = |log: String| CompileError::Compile { name, gpu, log };
        let mut program: Program = std::ptr::null_mut();
        // SAFETY: the strings live through the calls; no headers are passed; the program is destroyed once, at the end.
        unsafe {
            let none = std::ptr::null();
            if make(&raw mut program, source.as_ptr(), title.as_ptr(), 0, none, none) != 0 {
                return Err(failed("it takes no program".into()));
            }
            let status = run(program, pointers.len() as c_int, pointers.as_ptr());
            let result = if status == 0 {
                self.bytes(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")
            } else {
                let log = self.bytes(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog");
                let text = log.map(|log| CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy().into());
                text.and_then(|text| Err(failed(text)))
            };
            destroy(&raw mut program);
            result.and_then(|code| if code.is_empty() { Err(failed("it made no code".into())) } else { Ok(code) })
        }
    }

    /// # Safety
    /// `program` is a live program; the two functions are a size and a bytes getter of nvrtc.h.
    unsafe fn bytes(&self, program: Program, size: &str, get: &str) -> Result<Vec<u8>, CompileError> {
        let size: unsafe extern "C" fn(Program, *mut usize) -> c_int = self.symbol(size)?;
        let get: unsafe extern "C" fn(Program, *mut c_char) -> c_int = self.symbol(get)?;
        let mut count = 0;
        // SAFETY: the buffer has the size that the library asked for.
        unsafe {
            if size(program, &raw mut count) != 0 {
                return Ok(Vec::new());
            }
            let mut bytes = vec![0u8; count];
            let got = get(program, bytes.as_mut_ptr().cast());
            Ok(if got == 0 { bytes } else { Vec::new() })
        }
    }
}
