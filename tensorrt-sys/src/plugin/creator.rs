//! The creator of a kind of plugin, and its registration.
use super::{Create, PluginObject, STATE, list, namespace, version};
use crate::abi::{InterfaceInfo, Object, PluginFieldCollection, Table, api_language, call, no_destructor};
use crate::log::Severity;
use crate::slots::plugin_registry;
use crate::{Library, Result};
use std::ffi::{CStr, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

/// An `IPluginCreatorV3One`; the registry holds on to it for the life of the process.
#[repr(C)]
struct Creator {
    table: *const c_void,
    library: &'static Library,
    name: &'static CStr,
    create: Create,
    fields: PluginFieldCollection,
}

extern "C" fn creator_info(_: Object) -> InterfaceInfo {
    InterfaceInfo { kind: c"PLUGIN CREATOR_V3ONE".as_ptr(), major: 1, minor: 0 }
}

static CREATOR: Table<9> = Table::new([
    api_language as _,
    creator_info as _,
    no_destructor as _,
    no_destructor as _,
    create_plugin as _,
    field_names as _,
    creator_name as _,
    version as _,
    namespace as _,
]);

fn creator<'a>(this: Object) -> &'a Creator {
    // SAFETY: the registry calls with what it was given, which is never freed.
    unsafe { &*this.cast::<Creator>() }
}

extern "C" fn create_plugin(
    this: Object,
    _: *const c_char,
    collection: *const PluginFieldCollection,
    _phase: i32,
) -> Object {
    let made = catch_unwind(AssertUnwindSafe(|| {
        let creator = creator(this);
        // SAFETY: TensorRT passes the fields that `fields_to_serialize` gave when the engine was written.
        let fields = unsafe { collection.as_ref().map(|all| list(all.fields, all.count as usize)).unwrap_or_default() };
        // SAFETY: names are C strings, and a field's data has the length it says, one byte for each character.
        let state = unsafe {
            fields
                .iter()
                .find(|field| !field.name.is_null() && CStr::from_ptr(field.name) == STATE)
                .map(|field| list(field.data.cast::<u8>(), field.length.max(0) as usize))
        };
        let plugin = (creator.create)(state.unwrap_or_default());
        let object =
            plugin.and_then(|plugin| PluginObject::new(creator.library, plugin).map_err(|error| error.to_string()));
        match object {
            Ok(object) => Box::into_raw(object).cast(),
            Err(reason) => {
                let name = creator.name.to_string_lossy();
                creator.library.log.message(Severity::Error, &format!("plugin `{name}`: {reason}"));
                std::ptr::null_mut()
            }
        }
    }));
    made.unwrap_or(std::ptr::null_mut())
}

extern "C" fn field_names(this: Object) -> *const PluginFieldCollection {
    &raw const creator(this).fields
}

extern "C" fn creator_name(this: Object) -> *const c_char {
    creator(this).name.as_ptr()
}

impl Library {
    /// Makes a kind of plugin known to this library, once for the life of the process.
    ///
    /// # Errors
    /// A library that takes no plugins, or a name that is taken by somebody else.
    pub fn register(&'static self, name: &'static CStr, create: Create) -> Result<()> {
        static REGISTERED: Mutex<Vec<(usize, &CStr)>> = Mutex::new(Vec::new());
        let mut registered = REGISTERED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let key = (std::ptr::from_ref(self) as usize, name);
        if registered.contains(&key) {
            return Ok(());
        }
        let fields = PluginFieldCollection { count: 0, fields: std::ptr::null() };
        let creator = Box::leak(Box::new(Creator { table: CREATOR.pointer(), library: self, name, create, fields }));
        let object: Object = std::ptr::from_mut(creator).cast();
        let accepted = call!(self.family(), self.plugin_registry()?, plugin_registry::REGISTER_CREATOR,
            (object => Object, c"".as_ptr() => *const c_char) -> bool)?;
        if !accepted {
            return Err(self.refused());
        }
        registered.push(key);
        Ok(())
    }
}
