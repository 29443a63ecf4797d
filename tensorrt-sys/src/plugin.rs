//! Layers of ours in a TensorRT network: `IPluginV3` with its three capabilities, and its creator, as Rust objects.
//!
//! C++ gives such a class one table pointer per base; here they are the four words at an object's start, and a callback
//! finds the object again by the place of the table it was called through.
mod creator;

use crate::abi::{
    DimsExprs, DynamicPluginTensorDesc, InterfaceInfo, Object, PluginField, PluginFieldCollection, PluginTensorDesc,
    Table, api_language, no_destructor,
};
use crate::log::Severity;
use crate::{DataType, Error, Library, PluginFieldType, Result};
use std::ffi::{CStr, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// A layer of ours. Its tensors are linear in memory.
pub trait Plugin: Send + Sync + 'static {
    /// The name under which its creator is registered.
    fn name(&self) -> &'static CStr;

    /// Types of its inputs and what comes out.
    fn signature(&self) -> Signature;

    /// What its creator needs to make it again; stored in the engine.
    fn state(&self) -> Vec<u8>;

    /// Bytes of device memory that [`Plugin::enqueue`] may use, for the largest shapes of its inputs.
    fn workspace(&self, inputs: &[Vec<i64>]) -> usize;

    /// Puts the work on the stream.
    ///
    /// # Errors
    /// What went wrong; it reaches the log, and the call that ran the engine fails.
    fn enqueue(&self, call: &PluginCall<'_>) -> std::result::Result<(), String>;
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    pub inputs: Vec<DataType>,
    pub outputs: Vec<PluginOutput>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PluginOutput {
    pub dtype: DataType,
    /// The input whose shape it has.
    pub like: usize,
    /// It is that input, changed in place.
    pub in_place: bool,
}

/// One run: shapes and device addresses.
pub struct PluginCall<'c> {
    pub inputs: &'c [PluginTensor],
    pub outputs: &'c [PluginTensor],
    pub workspace: u64,
    /// A `cudaStream_t`.
    pub stream: *mut c_void,
}

#[derive(Clone, Debug)]
pub struct PluginTensor {
    pub shape: Vec<i64>,
    pub address: u64,
}

/// Makes a plugin from its state.
pub type Create = fn(&[u8]) -> std::result::Result<Box<dyn Plugin>, String>;

/// What all copies of a plugin have in common; it never moves, since TensorRT holds pointers into it.
struct Shared {
    library: &'static Library,
    plugin: Box<dyn Plugin>,
    signature: Signature,
    /// Kept for `field`.
    _state: Vec<u8>,
    field: PluginField,
    collection: PluginFieldCollection,
}

// SAFETY: the raw pointers lead into the same allocation, which is not changed after it was made.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

const STATE: &CStr = c"state";

impl Shared {
    fn new(library: &'static Library, plugin: Box<dyn Plugin>) -> Result<Arc<Shared>> {
        let family = library.family();
        let (signature, state) = (plugin.signature(), plugin.state());
        let kind = PluginFieldType::Char.value(family).ok_or(Error::Absent { method: "PluginFieldType" })?;
        let length = i32::try_from(state.len());
        let length = length.map_err(|_| Error::argument(&plugin.name().to_string_lossy(), "its state is too long"))?;
        let field = PluginField { name: STATE.as_ptr(), data: state.as_ptr().cast(), kind, length };
        let empty = PluginFieldCollection { count: 1, fields: std::ptr::null() };
        let mut shared = Arc::new(Shared { library, plugin, signature, _state: state, field, collection: empty });
        // The one place where the collection's pointer can be set: before anybody else has the Arc.
        if let Some(inner) = Arc::get_mut(&mut shared) {
            inner.collection.fields = &raw const inner.field;
        }
        Ok(shared)
    }

    fn dtype(&self, position: usize) -> Option<i32> {
        let inputs = self.signature.inputs.iter().copied();
        let all = inputs.chain(self.signature.outputs.iter().map(|output| output.dtype));
        all.into_iter().nth(position).and_then(|dtype| dtype.value(self.library.family()))
    }
}

/// An `IPluginV3`.
#[repr(C)]
pub(crate) struct PluginObject {
    /// Of the plugin itself and of its core, build and runtime capabilities.
    tables: [*const c_void; 4],
    shared: Arc<Shared>,
}

impl PluginObject {
    pub(crate) fn new(library: &'static Library, plugin: Box<dyn Plugin>) -> Result<Box<PluginObject>> {
        Ok(PluginObject::of(Shared::new(library, plugin)?))
    }

    fn of(shared: Arc<Shared>) -> Box<PluginObject> {
        let tables = [PLUGIN.pointer(), CORE.pointer(), BUILD.pointer(), RUNTIME.pointer()];
        Box::new(PluginObject { tables, shared })
    }

    pub(crate) fn outputs(&self) -> usize {
        self.shared.signature.outputs.len()
    }

    pub(crate) fn object(&self) -> Object {
        std::ptr::from_ref(self).cast_mut().cast()
    }

    /// A copy that belongs to TensorRT, which ends it through its destructor.
    fn give(&self) -> Object {
        Box::into_raw(PluginObject::of(Arc::clone(&self.shared))).cast()
    }
}

/// Runs a callback on the plugin whose table number `place` it was called through; a panic must not cross into C++.
fn with<T>(this: Object, place: usize, otherwise: T, body: impl FnOnce(&PluginObject) -> T) -> T {
    catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: TensorRT calls with the address of one of the four table words of a live plugin object.
        let object = unsafe { &*this.cast::<*const c_void>().sub(place).cast::<PluginObject>() };
        body(object)
    }))
    .unwrap_or(otherwise)
}

/// # Safety
/// `start` points at `count` values, or `count` is 0.
unsafe fn list<'a, T>(start: *const T, count: usize) -> &'a [T] {
    // SAFETY: the caller's promise.
    if start.is_null() { &[] } else { unsafe { std::slice::from_raw_parts(start, count) } }
}

macro_rules! interface {
    ($function:ident, $kind:literal, $major:literal) => {
        extern "C" fn $function(_: Object) -> InterfaceInfo {
            InterfaceInfo { kind: $kind.as_ptr(), major: $major, minor: 0 }
        }
    };
}
interface!(plugin_info, c"PLUGIN", 1);
interface!(core_info, c"PLUGIN_V3ONE_CORE", 1);
interface!(build_info, c"PLUGIN_V3ONE_BUILD", 2);
interface!(runtime_info, c"PLUGIN_V3ONE_RUNTIME", 1);

static PLUGIN: Table<6> = Table::new([
    api_language as _,
    plugin_info as _,
    no_destructor as _,
    plugin_delete as _,
    capability as _,
    plugin_clone as _,
]);

static CORE: Table<7> = Table::new([
    api_language as _,
    core_info as _,
    no_destructor as _,
    no_destructor as _,
    core_name as _,
    version as _,
    namespace as _,
]);

static BUILD: Table<16> = Table::new([
    api_language as _,
    build_info as _,
    no_destructor as _,
    no_destructor as _,
    configure as _,
    output_types as _,
    output_shapes as _,
    supports as _,
    output_count as _,
    workspace as _,
    no_tactics as _,
    no_tactic_count as _,
    no_text as _,
    combination_limit as _,
    no_text as _,
    aliased_input as _,
]);

static RUNTIME: Table<9> = Table::new([
    api_language as _,
    runtime_info as _,
    no_destructor as _,
    no_destructor as _,
    set_tactic as _,
    shape_changed as _,
    enqueue as _,
    attach as _,
    fields_to_serialize as _,
]);

extern "C" fn plugin_delete(this: Object) {
    // SAFETY: TensorRT deletes what `give` or `create_plugin` made, once.
    let object = unsafe { Box::from_raw(this.cast::<PluginObject>()) };
    let _ = catch_unwind(AssertUnwindSafe(|| drop(object)));
}

/// 0 is the core, 1 the build, 2 the runtime capability.
extern "C" fn capability(this: Object, kind: i32) -> Object {
    match usize::try_from(kind) {
        // SAFETY: the object starts with four table words.
        Ok(place @ 0..=2) => unsafe { this.cast::<Object>().add(1 + place).cast() },
        _ => std::ptr::null_mut(),
    }
}

extern "C" fn plugin_clone(this: Object) -> Object {
    with(this, 0, std::ptr::null_mut(), PluginObject::give)
}

extern "C" fn core_name(this: Object) -> *const c_char {
    with(this, 1, std::ptr::null(), |object| object.shared.plugin.name().as_ptr())
}

extern "C" fn version(_: Object) -> *const c_char {
    VERSION.as_ptr()
}

extern "C" fn namespace(_: Object) -> *const c_char {
    c"".as_ptr()
}

const VERSION: &CStr = c"1";

extern "C" fn configure(
    _: Object,
    _: *const DynamicPluginTensorDesc,
    _: i32,
    _: *const DynamicPluginTensorDesc,
    _: i32,
) -> i32 {
    0
}

extern "C" fn output_types(this: Object, outputs: *mut i32, count: i32, _: *const i32, inputs: i32) -> i32 {
    with(this, 2, 1, |object| {
        for place in 0..count as usize {
            let Some(dtype) = object.shared.dtype(inputs as usize + place) else { return 1 };
            // SAFETY: TensorRT gives room for `count` types.
            unsafe { *outputs.add(place) = dtype };
        }
        0
    })
}

extern "C" fn output_shapes(
    this: Object,
    inputs: *const DimsExprs,
    count: i32,
    _: *const DimsExprs,
    _: i32,
    outputs: *mut DimsExprs,
    output_count: i32,
    _: Object,
) -> i32 {
    with(this, 2, 1, |object| {
        // SAFETY: TensorRT passes `count` shapes.
        let inputs = unsafe { list(inputs, count as usize) };
        for (place, output) in object.shared.signature.outputs.iter().enumerate().take(output_count as usize) {
            let Some(shape) = inputs.get(output.like) else { return 1 };
            // SAFETY: TensorRT gives room for `output_count` shapes.
            unsafe { *outputs.add(place) = *shape };
        }
        0
    })
}

extern "C" fn supports(
    this: Object,
    position: i32,
    tensors: *const DynamicPluginTensorDesc,
    inputs: i32,
    outputs: i32,
) -> bool {
    with(this, 2, false, |object| {
        // SAFETY: TensorRT passes the descriptions of all inputs, then of all outputs.
        let tensors = unsafe { list(tensors, (inputs + outputs) as usize) };
        let linear = 0;
        tensors.get(position as usize).is_some_and(|tensor| {
            tensor.desc.format == linear && Some(tensor.desc.dtype) == object.shared.dtype(position as usize)
        })
    })
}

extern "C" fn output_count(this: Object) -> i32 {
    with(this, 2, 0, |object| object.outputs() as i32)
}

extern "C" fn workspace(
    this: Object,
    inputs: *const DynamicPluginTensorDesc,
    count: i32,
    _: *const DynamicPluginTensorDesc,
    _: i32,
) -> usize {
    with(this, 2, 0, |object| {
        // SAFETY: TensorRT passes `count` descriptions.
        let inputs = unsafe { list(inputs, count as usize) };
        let largest: Vec<Vec<i64>> = inputs.iter().map(|input| input.max.to_vec().unwrap_or_default()).collect();
        object.shared.plugin.workspace(&largest)
    })
}

extern "C" fn no_tactics(_: Object, _: *mut i32, _: i32) -> i32 {
    0
}

extern "C" fn no_tactic_count(_: Object) -> i32 {
    0
}

extern "C" fn no_text(_: Object) -> *const c_char {
    std::ptr::null()
}

extern "C" fn combination_limit(_: Object) -> i32 {
    100
}

extern "C" fn aliased_input(this: Object, output: i32) -> i32 {
    with(this, 2, -1, |object| match object.shared.signature.outputs.get(output as usize) {
        Some(output) if output.in_place => output.like as i32,
        _ => -1,
    })
}

extern "C" fn set_tactic(_: Object, _: i32) -> i32 {
    0
}

extern "C" fn shape_changed(_: Object, _: *const PluginTensorDesc, _: i32, _: *const PluginTensorDesc, _: i32) -> i32 {
    0
}

extern "C" fn enqueue(
    this: Object,
    input_descs: *const PluginTensorDesc,
    output_descs: *const PluginTensorDesc,
    inputs: *const Object,
    outputs: *const Object,
    workspace: Object,
    stream: Object,
) -> i32 {
    with(this, 3, 1, |object| {
        let signature = &object.shared.signature;
        // SAFETY: TensorRT passes one description and one address for each input and output of the signature.
        let tensors = |descs: *const PluginTensorDesc, addresses: *const Object, count: usize| unsafe {
            let pairs = std::iter::zip(list(descs, count), list(addresses, count));
            pairs
                .map(|(desc, &address)| PluginTensor {
                    shape: desc.dims.to_vec().unwrap_or_default(),
                    address: address as u64,
                })
                .collect::<Vec<_>>()
        };
        let inputs = tensors(input_descs, inputs, signature.inputs.len());
        let outputs = tensors(output_descs, outputs, signature.outputs.len());
        let call = PluginCall { inputs: &inputs, outputs: &outputs, workspace: workspace as u64, stream };
        match object.shared.plugin.enqueue(&call) {
            Ok(()) => 0,
            Err(reason) => {
                // TensorRT loses the status; the log does not lose the reason.
                let name = object.shared.plugin.name().to_string_lossy();
                object.shared.library.log.message(Severity::Error, &format!("plugin `{name}`: {reason}"));
                1
            }
        }
    })
}

extern "C" fn attach(this: Object, _: Object) -> Object {
    with(this, 3, std::ptr::null_mut(), PluginObject::give)
}

extern "C" fn fields_to_serialize(this: Object) -> *const PluginFieldCollection {
    with(this, 3, std::ptr::null(), |object| &raw const object.shared.collection)
}

#[cfg(all(test, feature = "rtx"))]
mod tests;
