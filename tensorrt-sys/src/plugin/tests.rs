//! The tables of a plugin object, called as TensorRT calls them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
use super::*;
use crate::abi::{Dims, call};
use crate::slots::{
    plugin_creator_v3_one, plugin_registry, plugin_v3, plugin_v3_one_build, plugin_v3_one_core, plugin_v3_one_runtime,
};
use std::sync::atomic::{AtomicUsize, Ordering};

static ALIVE: AtomicUsize = AtomicUsize::new(0);

/// Fails with the sum of its input's sizes and its state, so that the test sees what reached it.
struct Teller(u8);

impl Teller {
    fn create(state: &[u8]) -> std::result::Result<Box<dyn Plugin>, String> {
        ALIVE.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(Teller(*state.first().ok_or("no state")?)))
    }
}

impl Drop for Teller {
    fn drop(&mut self) {
        ALIVE.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Plugin for Teller {
    fn name(&self) -> &'static CStr {
        c"Teller"
    }
    fn signature(&self) -> Signature {
        let output = |like, in_place| PluginOutput { dtype: DataType::Half, like, in_place };
        Signature { inputs: vec![DataType::Half, DataType::Int32], outputs: vec![output(1, false), output(0, true)] }
    }
    fn state(&self) -> Vec<u8> {
        vec![self.0]
    }
    fn workspace(&self, inputs: &[Vec<i64>]) -> usize {
        inputs.iter().flatten().sum::<i64>() as usize
    }
    fn enqueue(&self, call: &PluginCall<'_>) -> std::result::Result<(), String> {
        let sizes: i64 = call.inputs.iter().flat_map(|input| &input.shape).sum();
        Err(format!("{sizes} {} {} {}", self.0, call.inputs[1].address, call.outputs[1].address))
    }
}

fn library() -> &'static Library {
    let data = std::env::var_os("XDG_DATA_HOME").map(std::path::PathBuf::from);
    let data = data.unwrap_or_else(|| std::path::Path::new(&std::env::var_os("HOME").unwrap()).join(".local/share"));
    Library::open(&data.join("trtvlm/backends/tensorrt-rtx-1.7.1.116/libtensorrt_rtx.so.1")).unwrap()
}

/// Every callback, called through the tables as TensorRT calls it.
#[test]
fn an_object_answers_through_each_of_its_tables() {
    let library = library();
    let family = library.family();
    let original = PluginObject::new(library, Teller::create(&[7]).unwrap()).unwrap();
    let clone = call!(family, original.object(), plugin_v3::CLONE, () -> Object).unwrap();
    assert!(clone != original.object());
    drop(original);
    let part = |kind: i32| call!(family, clone, plugin_v3::GET_CAPABILITY_INTERFACE, (kind => i32) -> Object).unwrap();
    let (core, build, runtime) = (part(0), part(1), part(2));
    assert!(part(3).is_null());
    let name = call!(family, core, plugin_v3_one_core::GET_PLUGIN_NAME, () -> *const c_char).unwrap();
    // SAFETY: the name is a constant.
    assert_eq!(unsafe { CStr::from_ptr(name) }, c"Teller");
    assert_eq!(call!(family, build, plugin_v3_one_build::GET_NB_OUTPUTS, () -> i32).unwrap(), 2);
    let alias =
        |output: i32| call!(family, build, plugin_v3_one_build::GET_ALIASED_INPUT, (output => i32) -> i32).unwrap();
    assert_eq!([alias(0), alias(1), alias(2)], [-1, 0, -1]);
    let dims = |sizes: &[i64]| Dims::new(sizes).unwrap();
    let (half, int) = (DataType::Half.value(family).unwrap(), DataType::Int32.value(family).unwrap());
    let desc = |dtype, sizes: &[i64]| PluginTensorDesc { dims: dims(sizes), dtype, format: 0, scale: 1.0 };
    let dynamic =
        |desc: PluginTensorDesc| DynamicPluginTensorDesc { desc, min: desc.dims, max: desc.dims, opt: desc.dims };
    let tensors = [desc(half, &[2, 3]), desc(int, &[5]), desc(half, &[5]), desc(int, &[2, 3])].map(dynamic);
    let supports = |place: i32| {
        let tensors = tensors.as_ptr();
        call!(family, build, plugin_v3_one_build::SUPPORTS_FORMAT_COMBINATION,
            (place => i32, tensors => *const DynamicPluginTensorDesc, 2 => i32, 2 => i32) -> bool)
        .unwrap()
    };
    assert_eq!([0, 1, 2, 3].map(supports), [true, true, true, false]);
    let bytes = call!(family, build, plugin_v3_one_build::GET_WORKSPACE_SIZE,
        (tensors.as_ptr() => *const DynamicPluginTensorDesc, 2 => i32, tensors.as_ptr() => *const DynamicPluginTensorDesc,
         2 => i32) -> usize);
    assert_eq!(bytes.unwrap(), 10);
    // What an engine keeps makes an equal plugin.
    library.register(c"Teller", Teller::create).unwrap();
    library.register(c"Teller", Teller::create).unwrap();
    let fields =
        call!(family, runtime, plugin_v3_one_runtime::GET_FIELDS_TO_SERIALIZE, () -> *const PluginFieldCollection);
    let registry = library.plugin_registry().unwrap();
    let creator = call!(family, registry, plugin_registry::GET_CREATOR,
        (c"Teller".as_ptr() => *const c_char, c"1".as_ptr() => *const c_char, c"".as_ptr() => *const c_char) -> Object);
    let made = call!(family, creator.unwrap(), plugin_creator_v3_one::CREATE_PLUGIN,
        (c"layer".as_ptr() => *const c_char, fields.unwrap() => *const PluginFieldCollection, 1 => i32) -> Object)
    .unwrap();
    let runtime = call!(family, made, plugin_v3::GET_CAPABILITY_INTERFACE, (2 => i32) -> Object).unwrap();
    let attached =
        call!(family, runtime, plugin_v3_one_runtime::ATTACH_TO_CONTEXT, (std::ptr::null_mut() => Object) -> Object);
    let attached = attached.unwrap();
    let runtime = call!(family, attached, plugin_v3::GET_CAPABILITY_INTERFACE, (2 => i32) -> Object).unwrap();
    let descs = tensors.map(|tensor| tensor.desc);
    let (inputs, outputs) = ([16 as Object, 32 as Object], [48 as Object, 64 as Object]);
    library.log.take_errors();
    let status = call!(family, runtime, plugin_v3_one_runtime::ENQUEUE, (descs.as_ptr() => *const PluginTensorDesc,
        descs[2..].as_ptr() => *const PluginTensorDesc, inputs.as_ptr() => *const Object,
        outputs.as_ptr() => *const Object, std::ptr::null_mut() => Object, std::ptr::null_mut() => Object) -> i32);
    assert_eq!(status.unwrap(), 1);
    assert_eq!(library.log.take_errors(), ["plugin `Teller`: 10 7 32 64"]);
    for object in [clone, made, attached] {
        // The deleting destructor, by which TensorRT ends what it was given.
        // SAFETY: each was given by the plugin and is not used again.
        unsafe {
            let table = *object.cast::<*const *const c_void>();
            let destroy: unsafe extern "C" fn(Object) = std::mem::transmute(*table.add(3));
            destroy(object);
        }
    }
    assert_eq!(ALIVE.load(Ordering::Relaxed), 0);
}
