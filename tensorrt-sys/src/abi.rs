//! The Itanium C++ ABI as far as TensorRT's public classes need it: calls through virtual tables, plain structs passed
//! and returned as the headers declare them, and virtual tables of our own.
use crate::Family;
use std::ffi::{c_char, c_void};

/// A C++ object; its first word is the pointer to its virtual table.
pub(crate) type Object = *mut c_void;

/// Marks a method that a version family lacks.
pub(crate) const NONE: u16 = u16::MAX;

/// A virtual method and its slot by family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Method {
    pub(crate) name: &'static str,
    /// In the order of [`Family`].
    pub(crate) slots: [u16; 3],
}

impl Method {
    pub(crate) fn slot(&self, family: Family) -> Option<usize> {
        Some(self.slots[family as usize]).filter(|&slot| slot != NONE).map(usize::from)
    }
}

/// Calls a method of `object`, the object whose virtual table holds it: `call!(family, object, METHOD(value: type, ...) -> type)`.
/// Evaluates to `Err(Error::Absent)` where the family lacks the method or the object is null.
macro_rules! call {
    ($family:expr, $object:expr, $method:path, ($($value:expr => $ty:ty),*) -> $result:ty) => {{
        let (object, method): ($crate::abi::Object, $crate::abi::Method) = ($object, $method);
        match method.slot($family) {
            Some(slot) if !object.is_null() => {
                // SAFETY: a public object starts with the pointer to its virtual table; the slot and the signature are
                // those of the headers of this version family, whose table length was checked when it was loaded.
                Ok(unsafe {
                    let table = *object.cast::<*const *const std::ffi::c_void>();
                    let function: unsafe extern "C" fn($crate::abi::Object $(, $ty)*) -> $result =
                        std::mem::transmute(*table.add(slot));
                    function(object $(, $value)*)
                })
            }
            _ => Err($crate::Error::Absent { method: method.name }),
        }
    }};
}
pub(crate) use call;

/// Word `place` of a public object: its implementation is word 1, a layer's own is word 2.
pub(crate) fn word(object: Object, place: usize) -> Object {
    if object.is_null() {
        return object;
    }
    // SAFETY: every public class holds at least the pointers asked for, by the headers' record layouts.
    unsafe { *object.cast::<Object>().add(place) }
}

/// `delete object`: the deleting destructor is slot 1 of every public class.
pub(crate) fn delete(object: Object) {
    if object.is_null() {
        return;
    }
    // SAFETY: as in `call!`; the caller owns the object and does not use it again.
    unsafe {
        let table = *object.cast::<*const *const c_void>();
        let destructor: unsafe extern "C" fn(Object) = std::mem::transmute(*table.add(1));
        destructor(object);
    }
}

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dims {
    pub(crate) count: i32,
    pub(crate) sizes: [i64; 8],
}

impl Dims {
    /// `None` for more than the 8 dimensions that TensorRT has.
    pub(crate) fn new(sizes: &[i64]) -> Option<Dims> {
        let mut dims = Dims { count: sizes.len() as i32, sizes: [0; 8] };
        dims.sizes.get_mut(..sizes.len())?.copy_from_slice(sizes);
        Some(dims)
    }

    /// `None` where TensorRT could not tell the shape.
    pub(crate) fn to_vec(self) -> Option<Vec<i64>> {
        self.sizes.get(..usize::try_from(self.count).ok()?).map(<[i64]>::to_vec)
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Weights {
    pub(crate) dtype: i32,
    pub(crate) values: *const c_void,
    pub(crate) count: i64,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Permutation {
    pub(crate) order: [i32; 8],
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct InterfaceInfo {
    pub(crate) kind: *const c_char,
    pub(crate) major: i32,
    pub(crate) minor: i32,
}

/// What a plugin is told of a tensor when it runs.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct PluginTensorDesc {
    pub(crate) dims: Dims,
    pub(crate) dtype: i32,
    pub(crate) format: i32,
    pub(crate) scale: f32,
}

/// What a plugin is told of a tensor while the engine is built.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct DynamicPluginTensorDesc {
    pub(crate) desc: PluginTensorDesc,
    pub(crate) min: Dims,
    pub(crate) max: Dims,
    pub(crate) opt: Dims,
}

/// Symbolic sizes; the expressions belong to TensorRT.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct DimsExprs {
    pub(crate) count: i32,
    pub(crate) sizes: [Object; 8],
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct PluginField {
    pub(crate) name: *const c_char,
    pub(crate) data: *const c_void,
    pub(crate) kind: i32,
    pub(crate) length: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct PluginFieldCollection {
    pub(crate) count: i32,
    pub(crate) fields: *const PluginField,
}

// The sizes that clang gives these classes in every header set that was looked at.
const _: () = {
    assert!(size_of::<Dims>() == 72);
    assert!(size_of::<Weights>() == 24);
    assert!(size_of::<Permutation>() == 32);
    assert!(size_of::<InterfaceInfo>() == 16);
    assert!(size_of::<PluginTensorDesc>() == 88);
    assert!(size_of::<DynamicPluginTensorDesc>() == 304);
    assert!(size_of::<DimsExprs>() == 72);
    assert!(size_of::<PluginField>() == 24);
    assert!(size_of::<PluginFieldCollection>() == 16);
};

/// A virtual table of ours with its Itanium header; objects point at `slots`.
#[repr(C)]
pub(crate) struct Table<const N: usize> {
    offset_to_top: isize,
    type_info: *const c_void,
    slots: [*const c_void; N],
}

// SAFETY: the pointers are to functions and constants.
unsafe impl<const N: usize> Sync for Table<N> {}

impl<const N: usize> Table<N> {
    pub(crate) const fn new(slots: [*const c_void; N]) -> Table<N> {
        Table { offset_to_top: 0, type_info: std::ptr::null(), slots }
    }

    pub(crate) fn pointer(&'static self) -> *const c_void {
        self.slots.as_ptr().cast()
    }
}

pub(crate) extern "C" fn api_language(_: Object) -> i32 {
    0
}

/// For objects that TensorRT never owns.
pub(crate) extern "C" fn no_destructor(_: Object) {}

/// Consecutive pointers to code from an object's virtual table on: its length, and a little more where another table
/// follows it at once.
pub(crate) fn table_length(object: Object) -> std::io::Result<usize> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let range = |line: &str| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let address = |text| usize::from_str_radix(text, 16).ok();
        rest.get(2..3).filter(|&execute| execute == "x")?;
        Some(address(start)?..address(end)?)
    };
    let code: Vec<_> = maps.lines().filter_map(range).collect();
    let mut length = 0;
    // SAFETY: the table lies in the library's read-only data and is followed by more of it; reading stops at the first
    // word that is no address of code.
    unsafe {
        let table = *object.cast::<*const usize>();
        while code.iter().any(|range| range.contains(&*table.add(length))) {
            length += 1;
        }
    }
    Ok(length)
}
