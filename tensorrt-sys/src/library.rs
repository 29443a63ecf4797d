//! Loading a TensorRT library: which version it is, and whether its tables are those we know.
use crate::abi::{Object, call, delete, table_length, word};
use crate::log::{Log, Severity};
use crate::slots::{builder, builder_config, network_definition};
use crate::{Error, NetworkDefinitionCreationFlag, Result};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Versions that share slots and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// TensorRT 10.6 to 10.16, without 10.8.
    Ten,
    /// TensorRT 11.
    Eleven,
    /// TensorRT-RTX from 1.5 on.
    Rtx,
}

/// A loaded TensorRT library. It stays loaded for the life of the process, as the library itself asks for.
pub struct Library {
    path: PathBuf,
    version: [i32; 4],
    family: Family,
    loaded: &'static libloading::Library,
    pub(crate) log: &'static Log,
}

impl Library {
    /// Loads a library by its path, once: TensorRT keeps the first logger it was given for the life of the process.
    ///
    /// # Errors
    /// A file that is no TensorRT, or a version that is not known.
    pub fn open(path: &Path) -> Result<&'static Library> {
        static LOADED: Mutex<Vec<&Library>> = Mutex::new(Vec::new());
        let mut loaded = LOADED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(library) = loaded.iter().find(|library| library.path == path) {
            return Ok(library);
        }
        let library: &Library = Box::leak(Box::new(Library::load(path)?));
        loaded.push(library);
        Ok(library)
    }

    fn load(path: &Path) -> Result<Library> {
        // SAFETY: loading runs the library's initializers, which is what the user asks for by naming it.
        let loaded =
            unsafe { libloading::Library::new(path) }.map_err(|source| Error::Load { path: path.into(), source })?;
        let loaded = Box::leak(Box::new(loaded));
        let number = |symbol: &'static str| {
            // SAFETY: the version functions take nothing and return an int, in every version.
            unsafe { loaded.get::<unsafe extern "C" fn() -> i32>(symbol.as_bytes()).map(|function| function()) }
                .map_err(|_| Error::Symbol { path: path.into(), symbol })
        };
        let version = [
            number("getInferLibMajorVersion")?,
            number("getInferLibMinorVersion")?,
            number("getInferLibPatchVersion")?,
            number("getInferLibBuildVersion").unwrap_or(0),
        ];
        let family = match version {
            [1, minor, ..] if minor >= 5 => Family::Rtx,
            // Slots of methods that came with 10.1 to 10.6 are in the table.
            [10, minor, ..] if minor >= 6 && minor != 8 => Family::Ten,
            [11, ..] => Family::Eleven,
            [major, minor, ..] => {
                return Err(Error::Version { path: path.into(), found: format!("version {major}.{minor}") });
            }
        };
        let log = Log::leak(family);
        Ok(Library { path: path.into(), version, family, loaded, log })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn family(&self) -> Family {
        self.family
    }

    /// Major, minor, patch, build.
    pub fn version(&self) -> [i32; 4] {
        self.version
    }

    /// `TensorRT-RTX 1.7.1.116`.
    pub fn name(&self) -> String {
        let product = if self.family == Family::Rtx { "TensorRT-RTX" } else { "TensorRT" };
        let [major, minor, patch, build] = self.version;
        format!("{product} {major}.{minor}.{patch}.{build}")
    }

    /// Sees every message of TensorRT's log from now on.
    pub fn on_log(&self, listener: impl Fn(Severity, &str) + Send + 'static) {
        self.log.listen(Box::new(listener));
    }

    /// Calls one of the two functions that everything starts from.
    fn create(&self, symbol: &'static str) -> Result<Object> {
        // Without a driver, TensorRT 10 throws through these C functions and the process is gone.
        if self.family != Family::Rtx && !driver_works() {
            return Err(Error::NoDriver);
        }
        let [major, minor, patch, _] = self.version;
        // SAFETY: the signature of these C functions is the same in every version; the logger is never freed; the
        // version is the library's own.
        let object = unsafe {
            let function = self.loaded.get::<unsafe extern "C" fn(Object, i32) -> Object>(symbol.as_bytes());
            let function = function.map_err(|_| Error::Symbol { path: self.path.clone(), symbol })?;
            function(self.log.object(), major * 10000 + minor * 100 + patch)
        };
        if object.is_null() { Err(self.refused()) } else { Ok(object) }
    }

    pub(crate) fn runtime(&'static self) -> Result<Object> {
        self.create("createInferRuntime_INTERNAL")
    }

    /// The registry of plugins, which belongs to the library.
    pub(crate) fn plugin_registry(&self) -> Result<Object> {
        let symbol = "getPluginRegistry";
        // SAFETY: this C function takes nothing and gives a pointer, in every version.
        unsafe {
            let function = self.loaded.get::<unsafe extern "C" fn() -> Object>(symbol.as_bytes());
            Ok(function.map_err(|_| Error::Symbol { path: self.path.clone(), symbol })?())
        }
    }

    /// A builder object, after making sure that asking for one is safe and the library is what it says.
    pub(crate) fn builder(&'static self) -> Result<Object> {
        let object = self.create("createInferBuilder_INTERNAL")?;
        self.check_tables(object).inspect_err(|_| delete(object))?;
        Ok(object)
    }

    /// Table lengths of the versions whose headers were read; the libraries themselves have a few entries more.
    fn check_tables(&self, object: Object) -> Result<()> {
        if !matches!(self.version, [10, 6, ..] | [1, 7, ..] | [11, 4, ..]) {
            return Ok(());
        }
        let flags = 1u32 << NetworkDefinitionCreationFlag::StronglyTyped.value(self.family).unwrap_or(0);
        let network = call!(self.family, word(object, 1), builder::CREATE_NETWORK_V2, (flags => u32) -> Object)?;
        let config = call!(self.family, word(object, 1), builder::CREATE_BUILDER_CONFIG, () -> Object)?;
        let check = |object, length: crate::abi::Method, extra| {
            let wanted = length.slot(self.family).unwrap_or(0) + extra;
            let found = table_length(word(object, 1)).map_err(Error::Maps)?;
            let class = length.name;
            if found == wanted { Ok(()) } else { Err(Error::Table { class, wanted, found }) }
        };
        let checked = check(object, builder::LENGTH, 1)
            .and_then(|()| check(network, network_definition::LENGTH, 3))
            .and_then(|()| check(config, builder_config::LENGTH, 1));
        delete(config);
        delete(network);
        checked
    }

    /// The error for something that TensorRT refused, with what it logged.
    pub(crate) fn refused(&self) -> Error {
        Error::Refused { messages: self.log.take_errors() }
    }

    pub(crate) fn has(&self, method: crate::abi::Method) -> bool {
        method.slot(self.family).is_some()
    }
}

/// Whether libcuda is there and finds a GPU.
fn driver_works() -> bool {
    // SAFETY: libcuda's initializers are harmless; cuInit takes flags that must be 0 and returns a status.
    unsafe {
        let Ok(cuda) = libloading::Library::new("libcuda.so.1") else { return false };
        cuda.get::<unsafe extern "C" fn(u32) -> i32>(b"cuInit").is_ok_and(|init| init(0) == 0)
    }
}
