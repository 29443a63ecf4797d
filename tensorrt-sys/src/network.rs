//! A network definition and its tensors. Every layer's output shape is asked for at once, so that a mistake shows where
//! it was made; layers carry the name they are given.
use crate::abi::{Dims, Object, Weights, call, delete, word};
use crate::builder::BuilderObject;
use crate::plugin::{Plugin, PluginObject};
use crate::slots::{layer, network_definition, tensor};
use crate::{DataType, Error, Family, Library, Result};
use std::cell::{Cell, RefCell};
use std::ffi::{CString, c_char};
use std::marker::PhantomData;
use std::pin::Pin;
use std::rc::Rc;

/// A strongly typed network. Constants are not copied: they live for `'w`, which outlives the network and its builds.
pub struct Network<'w> {
    builder: Rc<BuilderObject>,
    object: Object,
    /// Invariant, so that `'w` cannot be shortened to let in a constant that dies earlier.
    constants: PhantomData<Cell<&'w [u8]>>,
    /// TensorRT works on copies of them, but may look at the originals until the network is gone.
    plugins: RefCell<Vec<Pin<Box<PluginObject>>>>,
}

/// A tensor of a network.
#[derive(Clone, Copy)]
pub struct Tensor<'n> {
    pub(crate) object: Object,
    network: PhantomData<&'n ()>,
}

impl Drop for Network<'_> {
    fn drop(&mut self) {
        delete(self.object);
    }
}

impl<'w> Network<'w> {
    pub(crate) fn new(builder: Rc<BuilderObject>, object: Object) -> Network<'w> {
        Network { builder, object, constants: PhantomData, plugins: RefCell::default() }
    }

    pub(crate) fn object(&self) -> Object {
        self.object
    }

    pub(crate) fn library(&self) -> &'static Library {
        self.builder.library
    }

    pub fn family(&self) -> Family {
        self.library().family()
    }

    /// The object whose table holds the network's methods.
    pub(crate) fn this(&self) -> Object {
        word(self.object, 1)
    }

    pub(crate) fn text(name: &str) -> Result<CString> {
        let limit = 4096;
        let text = CString::new(name).map_err(|_| Error::argument(name, "the name holds a zero byte"))?;
        if name.len() > limit {
            return Err(Error::argument(name, format!("the name has more than {limit} bytes")));
        }
        Ok(text)
    }

    pub(crate) fn dims(name: &str, sizes: &[i64]) -> Result<Dims> {
        Dims::new(sizes).ok_or_else(|| Error::argument(name, "TensorRT has at most 8 dimensions"))
    }

    /// Dimensions of -1 are known only when the engine runs.
    ///
    /// # Errors
    /// What TensorRT refuses.
    pub fn input(&self, name: &str, dtype: DataType, sizes: &[i64]) -> Result<Tensor<'_>> {
        let (text, dims) = (Self::text(name)?, Self::dims(name, sizes)?);
        let family = self.library().family();
        let dtype = self.value(dtype.value(family), "DataType")?;
        let object = call!(family, self.this(), network_definition::ADD_INPUT,
            (text.as_ptr() => *const c_char, dtype => i32, &raw const dims => *const Dims) -> Object)?;
        if object.is_null() { Err(self.library().refused()) } else { Ok(self.tensor(object)) }
    }

    /// Names a tensor and makes it an output.
    ///
    /// # Errors
    /// A name that TensorRT cannot take.
    pub fn mark_output(&self, name: &str, tensor: Tensor<'_>) -> Result<()> {
        let text = Self::text(name)?;
        let family = self.library().family();
        call!(family, word(tensor.object, 1), tensor::SET_NAME, (text.as_ptr() => *const c_char) -> ())?;
        call!(family, self.this(), network_definition::MARK_OUTPUT, (tensor.object => Object) -> ())
    }

    /// A constant, its bytes used in place. INT4 has two elements a byte, the first in the low half.
    ///
    /// # Errors
    /// A number of bytes that is not that of the shape.
    pub fn constant(&self, name: &str, dtype: DataType, sizes: &[i64], bytes: &'w [u8]) -> Result<Tensor<'_>> {
        let weights = self.weights(name, dtype, sizes, bytes)?;
        let dims = Self::dims(name, sizes)?;
        let object = call!(self.library().family(), self.this(), network_definition::ADD_CONSTANT,
            (&raw const dims => *const Dims, weights => Weights) -> Object)?;
        self.finish(name, object)
    }

    /// A layer of ours.
    ///
    /// # Errors
    /// A library without plugins, or inputs that do not fit.
    pub fn plugin(&self, name: &str, inputs: &[Tensor<'_>], plugin: Box<dyn Plugin>) -> Result<Vec<Tensor<'_>>> {
        let family = self.library().family();
        let plugin = PluginObject::new(self.library(), plugin)?;
        let objects: Vec<Object> = inputs.iter().map(|input| input.object).collect();
        let (count, none) = (objects.len() as i32, std::ptr::null::<Object>());
        let object = call!(family, self.this(), network_definition::ADD_PLUGIN_V3, (objects.as_ptr() => *const Object,
            count => i32, none => *const Object, 0 => i32, plugin.object() => Object) -> Object)?;
        let outputs = plugin.outputs();
        self.plugins.borrow_mut().push(Box::into_pin(plugin));
        if object.is_null() {
            return Err(self.library().refused());
        }
        let (this, text) = (word(object, 1), Self::text(name)?);
        call!(family, this, layer::SET_NAME, (text.as_ptr() => *const c_char) -> ())?;
        let output = |place: usize| {
            let output = call!(family, this, layer::GET_OUTPUT, (place as i32 => i32) -> Object)?;
            self.checked(&format!("{name}/{place}"), output)
        };
        (0..outputs).map(output).collect()
    }

    /// TensorRT itself takes a wrong count without a word.
    pub(crate) fn weights(&self, name: &str, dtype: DataType, sizes: &[i64], bytes: &'w [u8]) -> Result<Weights> {
        let count = sizes.iter().try_fold(1i64, |count, &size| count.checked_mul(size).filter(|_| size > 0));
        let bits = match dtype {
            DataType::Int4 | DataType::Fp4 => 4,
            DataType::Int8 | DataType::Uint8 | DataType::Bool | DataType::Fp8 | DataType::E8m0 => 8,
            DataType::Half | DataType::Bf16 => 16,
            DataType::Float | DataType::Int32 => 32,
            DataType::Int64 => 64,
        };
        let wanted = count.and_then(|count| count.checked_mul(bits)).filter(|bits| bits % 8 == 0).map(|bits| bits / 8);
        if wanted != i64::try_from(bytes.len()).ok() {
            let reason = format!("{sizes:?} of {dtype:?} does not fill {} bytes", bytes.len());
            return Err(Error::argument(name, reason));
        }
        let dtype = self.value(dtype.value(self.library().family()), "DataType")?;
        Ok(Weights { dtype, values: bytes.as_ptr().cast(), count: count.unwrap_or(0) })
    }

    /// The shape of a tensor, -1 where it is known only when the engine runs.
    ///
    /// # Errors
    /// What TensorRT says of the layer that makes it.
    pub fn shape(&self, tensor: Tensor<'_>) -> Result<Vec<i64>> {
        let dims = call!(self.library().family(), word(tensor.object, 1), tensor::GET_DIMENSIONS, () -> Dims)?;
        dims.to_vec().ok_or_else(|| self.library().refused())
    }

    pub(crate) fn tensor(&self, object: Object) -> Tensor<'_> {
        Tensor { object, network: PhantomData }
    }

    /// A value of an enum that not every version has.
    pub(crate) fn value(&self, value: Option<i32>, name: &'static str) -> Result<i32> {
        value.ok_or(Error::Absent { method: name })
    }

    /// Names a new layer and gives its output, or says why there is none.
    pub(crate) fn finish(&self, name: &str, object: Object) -> Result<Tensor<'_>> {
        if object.is_null() {
            return Err(self.library().refused());
        }
        let (family, text) = (self.library().family(), Self::text(name)?);
        let this = word(object, 1);
        call!(family, this, layer::SET_NAME, (text.as_ptr() => *const c_char) -> ())?;
        let output = call!(family, this, layer::GET_OUTPUT, (0 => i32) -> Object)?;
        self.checked(name, output)
    }

    /// Names the tensor too, and asks for its shape, which fails where the layer's inputs do not fit.
    pub(crate) fn checked(&self, name: &str, output: Object) -> Result<Tensor<'_>> {
        let (family, text) = (self.library().family(), Self::text(name)?);
        call!(family, word(output, 1), tensor::SET_NAME, (text.as_ptr() => *const c_char) -> ())?;
        let tensor = self.tensor(output);
        self.shape(tensor).map(|_| tensor)
    }
}
