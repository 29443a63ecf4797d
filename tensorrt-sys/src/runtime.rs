//! Running engines.
use crate::abi::{Dims, Object, call, delete, word};
use crate::slots::{cuda_engine, engine_inspector, execution_context, runtime};
use crate::{
    DataType, Error, ExecutionContextAllocationStrategy, LayerInformationFormat, Library, OptProfileSelector, Result,
    TensorIOMode,
};
use std::ffi::{CStr, CString, c_char, c_void};
use std::rc::Rc;

struct RuntimeObject {
    library: &'static Library,
    object: Object,
}

impl Drop for RuntimeObject {
    fn drop(&mut self) {
        delete(self.object);
    }
}

struct EngineObject {
    /// Engines go before the runtime that made them.
    runtime: RuntimeObject,
    object: Object,
}

impl Drop for EngineObject {
    fn drop(&mut self) {
        delete(self.object);
    }
}

/// A loaded engine.
#[derive(Clone)]
pub struct Engine(Rc<EngineObject>);

/// An input or output of an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineTensor {
    pub name: String,
    pub input: bool,
    pub dtype: DataType,
    /// -1 where the size is known only when the engine runs.
    pub shape: Vec<i64>,
}

impl Engine {
    /// Loads a plan onto the current GPU.
    ///
    /// # Errors
    /// [`Error::Refused`] with TensorRT's messages.
    pub fn load(library: &'static Library, plan: &[u8]) -> Result<Engine> {
        library.log.take_errors();
        let runtime = RuntimeObject { library, object: library.runtime()? };
        let object = call!(library.family(), word(runtime.object, 1), runtime::DESERIALIZE_CUDA_ENGINE,
            (plan.as_ptr() => *const u8, plan.len() => usize) -> Object)?;
        if object.is_null() {
            return Err(library.refused());
        }
        Ok(Engine(Rc::new(EngineObject { runtime, object })))
    }

    fn library(&self) -> &'static Library {
        self.0.runtime.library
    }

    fn this(&self) -> Object {
        word(self.0.object, 1)
    }

    /// # Errors
    /// A type that this crate does not know.
    pub fn tensors(&self) -> Result<Vec<EngineTensor>> {
        let (family, this) = (self.library().family(), self.this());
        let count = call!(family, this, cuda_engine::GET_NB_IO_TENSORS, () -> i32)?;
        let tensor = |place: i32| {
            let name = call!(family, this, cuda_engine::GET_IO_TENSOR_NAME, (place => i32) -> *const c_char)?;
            let mode = call!(family, this, cuda_engine::GET_TENSOR_IO_MODE, (name => *const c_char) -> i32)?;
            let value = call!(family, this, cuda_engine::GET_TENSOR_DATA_TYPE, (name => *const c_char) -> i32)?;
            let shape = call!(family, this, cuda_engine::GET_TENSOR_SHAPE, (name => *const c_char) -> Dims)?;
            let dtype = TYPES.into_iter().find(|dtype| dtype.value(family) == Some(value));
            Ok(EngineTensor {
                name: text(name),
                input: Some(mode) == TensorIOMode::Input.value(family),
                dtype: dtype.ok_or(Error::Absent { method: "DataType" })?,
                shape: shape.to_vec().unwrap_or_default(),
            })
        };
        (0..count).map(tensor).collect()
    }

    pub fn profiles(&self) -> Result<usize> {
        let count = call!(self.library().family(), self.this(), cuda_engine::GET_NB_OPTIMIZATION_PROFILES, () -> i32)?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// The largest shape of an input in an optimization profile.
    ///
    /// # Errors
    /// A tensor that is no input, or a profile that the engine does not have.
    pub fn largest_shape(&self, input: &str, profile: usize) -> Result<Vec<i64>> {
        let (family, name) = (self.library().family(), name(input)?);
        let largest = OptProfileSelector::Max.value(family).unwrap_or(2);
        let dims = call!(family, self.this(), cuda_engine::GET_PROFILE_SHAPE,
            (name.as_ptr() => *const c_char, profile as i32 => i32, largest => i32) -> Dims)?;
        dims.to_vec().ok_or_else(|| self.library().refused())
    }

    /// TensorRT's own description of the layers, JSON; with names only, unless the engine was built to describe itself.
    ///
    /// # Errors
    /// Where TensorRT gives none.
    pub fn describe(&self) -> Result<String> {
        let family = self.library().family();
        let inspector = call!(family, self.this(), cuda_engine::CREATE_ENGINE_INSPECTOR, () -> Object)?;
        if inspector.is_null() {
            return Err(self.library().refused());
        }
        let format = LayerInformationFormat::Json.value(family).unwrap_or(1);
        let described = call!(family, word(inspector, 1), engine_inspector::GET_ENGINE_INFORMATION,
            (format => i32) -> *const c_char);
        // The text belongs to the inspector.
        let described = described.map(text);
        delete(inspector);
        described
    }

    /// A way to run the engine with the shapes of one optimization profile.
    ///
    /// # Safety
    /// `stream` is a CUDA stream of the current context.
    ///
    /// # Errors
    /// [`Error::Refused`], mostly for want of memory.
    pub unsafe fn context(&self, profile: usize, stream: *mut c_void) -> Result<Context> {
        let family = self.library().family();
        let strategy = ExecutionContextAllocationStrategy::OnProfileChange.value(family).unwrap_or(0);
        let object = call!(family, self.this(), cuda_engine::CREATE_EXECUTION_CONTEXT, (strategy => i32) -> Object)?;
        if object.is_null() {
            return Err(self.library().refused());
        }
        let context = Context { engine: self.clone(), object };
        let profile = profile as i32;
        let accepted = call!(family, context.this(), execution_context::SET_OPTIMIZATION_PROFILE_ASYNC,
            (profile => i32, stream => *mut c_void) -> bool)?;
        context.accepted(accepted)?;
        Ok(context)
    }
}

/// An execution context: shapes and addresses of one call after another.
pub struct Context {
    engine: Engine,
    object: Object,
}

impl Drop for Context {
    fn drop(&mut self) {
        delete(self.object);
    }
}

impl Context {
    fn this(&self) -> Object {
        word(self.object, 1)
    }

    fn accepted(&self, accepted: bool) -> Result<()> {
        if accepted { Ok(()) } else { Err(self.engine.library().refused()) }
    }

    /// # Errors
    /// A shape outside the profile.
    pub fn set_shape(&self, input: &str, shape: &[i64]) -> Result<()> {
        let name = name(input)?;
        let dims = Dims::new(shape).ok_or_else(|| Error::argument(input, "more than 8 dimensions"))?;
        let family = self.engine.library().family();
        let accepted = call!(family, self.this(), execution_context::SET_INPUT_SHAPE,
            (name.as_ptr() => *const c_char, &raw const dims => *const Dims) -> bool)?;
        self.accepted(accepted)
    }

    /// The shape that a tensor has with the input shapes set, none where one is missing.
    ///
    /// # Errors
    /// A name with a zero byte.
    pub fn shape(&self, tensor: &str) -> Result<Option<Vec<i64>>> {
        let name = name(tensor)?;
        let family = self.engine.library().family();
        let dims = call!(family, self.this(), execution_context::GET_TENSOR_SHAPE,
            (name.as_ptr() => *const c_char) -> Dims)?;
        Ok(dims.to_vec().filter(|sizes| sizes.iter().all(|&size| size >= 0)))
    }

    /// # Safety
    /// Device memory that is large enough for the tensor, and stays so until no call uses it any more.
    ///
    /// # Errors
    /// A tensor that the engine does not have.
    pub unsafe fn set_address(&self, tensor: &str, address: u64) -> Result<()> {
        let name = name(tensor)?;
        let family = self.engine.library().family();
        let accepted = call!(family, self.this(), execution_context::SET_TENSOR_ADDRESS,
            (name.as_ptr() => *const c_char, address as *mut c_void => *mut c_void) -> bool)?;
        self.accepted(accepted)
    }

    /// Puts one run on the stream.
    ///
    /// # Safety
    /// `stream` is a CUDA stream of the context that the engine was loaded in; addresses as in `set_address`.
    ///
    /// # Errors
    /// Missing shapes or addresses, a failing plugin or kernel.
    pub unsafe fn enqueue(&self, stream: *mut c_void) -> Result<()> {
        let family = self.engine.library().family();
        let accepted = call!(family, self.this(), execution_context::ENQUEUE_V3, (stream => *mut c_void) -> bool)?;
        self.accepted(accepted)
    }
}

const TYPES: [DataType; 10] = [
    DataType::Float,
    DataType::Half,
    DataType::Bf16,
    DataType::Int8,
    DataType::Int32,
    DataType::Int64,
    DataType::Bool,
    DataType::Uint8,
    DataType::Fp8,
    DataType::Int4,
];

fn name(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::argument(text, "the name holds a zero byte"))
}

fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: TensorRT gives C strings that live as long as their owner, which the caller holds.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}
