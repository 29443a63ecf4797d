//! An engine on the GPU with memory for its tensors, large enough for everything it was built for.
#![expect(unsafe_code, reason = "engines run on raw addresses; each block says why they hold")]
use super::RuntimeError;
use crate::device::{Buffer, Device};
use crate::lower::data_type;
use crate::plugins::Communicator;
use graphs::DType;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use tensorrt_sys as trt;
use trt::EngineTensor;

pub(super) struct Loaded {
    /// One for each optimization profile; gone before the buffers that they point at.
    contexts: Vec<trt::Context>,
    tensors: Vec<EngineTensor>,
    buffers: BTreeMap<String, Buffer>,
}

/// The tensor whose memory a tensor has: a cache that goes in and comes out is one.
fn owner(tensor: &str) -> String {
    match tensor.strip_prefix("present_") {
        Some(rest) => format!("past_{rest}"),
        None => tensor.to_owned(),
    }
}

/// The type in memory, where it is one that this crate computes with.
fn dtype(tensor: &EngineTensor) -> Result<DType, RuntimeError> {
    let known = [DType::Float32, DType::Float16, DType::Bfloat16, DType::Int32, DType::Int64, DType::Int8, DType::Bool];
    let found = known.into_iter().find(|dtype| data_type(*dtype) == tensor.dtype);
    found.ok_or_else(|| RuntimeError::Inconsistent { what: format!("tensor `{}`", tensor.name) })
}

fn count(shape: &[i64]) -> usize {
    shape.iter().map(|&size| usize::try_from(size).unwrap_or(0)).product()
}

/// A shape with its open dimensions filled in.
fn filled(shape: &[i64], batch: usize, places: usize) -> Vec<i64> {
    let size = |(dim, &size): (usize, &i64)| match (size, dim) {
        (-1, 0) => batch as i64,
        (-1, _) => places as i64,
        _ => size,
    };
    shape.iter().enumerate().map(size).collect()
}

impl Loaded {
    /// An input that is also a result of `lender` is read where that engine writes it; `lender` must not go before this
    /// one has run last. One rank's engine joins the others by `communicator`.
    pub(super) fn open(
        device: &Device,
        library: &'static trt::Library,
        path: &Path,
        lender: Option<&Loaded>,
        communicator: Option<&Arc<Communicator>>,
    ) -> Result<Loaded, RuntimeError> {
        let plan = trt::MappedFile::open(path)?;
        let engine = Communicator::while_loading(communicator, || trt::Engine::load(library, plan.bytes()))?;
        let (tensors, profiles) = (engine.tensors()?, engine.profiles()?);
        // SAFETY: the stream is the device's own and lives as long as it does.
        let context = |profile| unsafe { engine.context(profile, device.raw_stream()) };
        let contexts = (0..profiles).map(context).collect::<Result<Vec<_>, _>>()?;
        let mut sizes: BTreeMap<String, usize> = BTreeMap::new();
        for (profile, context) in contexts.iter().enumerate() {
            for tensor in tensors.iter().filter(|tensor| tensor.input && tensor.shape.contains(&-1)) {
                let largest = engine.largest_shape(&tensor.name, profile)?;
                context.set_shape(&tensor.name, &largest)?;
            }
            for tensor in &tensors {
                let shape = context.shape(&tensor.name)?.unwrap_or_default();
                let bytes = dtype(tensor)?.bytes(count(&shape));
                let size = sizes.entry(owner(&tensor.name)).or_default();
                *size = bytes.max(*size);
            }
        }
        let borrowed = |name: &str| {
            let input = tensors.iter().any(|tensor| tensor.input && tensor.name == name);
            lender.filter(|lender| input && lender.results().iter().any(|result| result == name))
        };
        let mut lent = BTreeMap::new();
        for (name, bytes) in &sizes {
            let Some(lender) = borrowed(name) else { continue };
            let (buffer, own) = (lender.buffer(name)?, tensors.iter().find(|tensor| tensor.name == *name));
            // Engines of different builds put together.
            if buffer.len() < *bytes || own.map(|own| own.dtype) != Some(lender.tensor(name)?.dtype) {
                return Err(RuntimeError::Inconsistent { what: format!("tensor `{name}`") });
            }
            lent.insert(name.clone(), device.address(buffer));
        }
        sizes.retain(|name, _| !lent.contains_key(name));
        let buffer = |(name, bytes)| Ok::<_, RuntimeError>((name, device.allocate(bytes)?));
        let buffers = sizes.into_iter().map(buffer).collect::<Result<BTreeMap<_, _>, _>>()?;
        let loaded = Loaded { contexts, tensors, buffers };
        for profile in 0..profiles {
            for tensor in &loaded.tensors {
                match lent.get(&tensor.name) {
                    // SAFETY: it was found to be large enough above; the caller keeps the lender.
                    Some(&address) => unsafe { loaded.context(profile)?.set_address(&tensor.name, address) }?,
                    None => loaded.bind(device, profile, &tensor.name, &owner(&tensor.name))?,
                }
            }
        }
        Ok(loaded)
    }

    /// Lets a tensor of one profile use the memory of another tensor.
    pub(super) fn bind(&self, device: &Device, profile: usize, tensor: &str, to: &str) -> Result<(), RuntimeError> {
        let address = device.address(self.buffer(to)?);
        // SAFETY: buffers are as large as the largest shape that any profile gives their tensors, or the caller, in this
        // module's parent, binds one that is of the same shape; they live as long as the contexts.
        Ok(unsafe { self.context(profile)?.set_address(tensor, address) }?)
    }

    fn context(&self, profile: usize) -> Result<&trt::Context, RuntimeError> {
        let context = self.contexts.get(profile);
        context.ok_or_else(|| RuntimeError::Inconsistent { what: format!("number of profiles ({profile})") })
    }

    pub(super) fn has(&self, tensor: &str) -> bool {
        self.tensors.iter().any(|found| found.name == tensor)
    }

    pub(super) fn profiles(&self) -> usize {
        self.contexts.len()
    }

    pub(super) fn buffer(&self, tensor: &str) -> Result<&Buffer, RuntimeError> {
        self.buffers.get(tensor).ok_or_else(|| RuntimeError::Inconsistent { what: format!("tensor `{tensor}`") })
    }

    pub(super) fn buffer_mut(&mut self, tensor: &str) -> Result<&mut Buffer, RuntimeError> {
        self.buffers.get_mut(tensor).ok_or_else(|| RuntimeError::Inconsistent { what: format!("tensor `{tensor}`") })
    }

    fn tensor(&self, name: &str) -> Result<&EngineTensor, RuntimeError> {
        let tensor = self.tensors.iter().find(|tensor| tensor.name == name);
        tensor.ok_or_else(|| RuntimeError::Inconsistent { what: format!("tensor `{name}`") })
    }

    /// Sets an input's shape and values; an input that the engine does not have is left out.
    pub(super) fn set_ints(
        &mut self,
        device: &Device,
        profile: usize,
        name: &str,
        shape: &[usize],
        values: &[i32],
    ) -> Result<(), RuntimeError> {
        if !self.has(name) {
            return Ok(());
        }
        self.set_shape(profile, name, shape)?;
        Ok(device.upload(bytemuck::cast_slice(values), self.buffer_mut(name)?)?)
    }

    /// The same for numbers, stored in the engine's own type.
    pub(super) fn set_floats(
        &mut self,
        device: &Device,
        profile: usize,
        name: &str,
        shape: &[usize],
        values: &[f32],
    ) -> Result<(), RuntimeError> {
        self.set_shape(profile, name, shape)?;
        let bytes = quant::from_f32(dtype(self.tensor(name)?)?, values);
        Ok(device.upload(&bytes, self.buffer_mut(name)?)?)
    }

    pub(super) fn set_shape(&self, profile: usize, name: &str, shape: &[usize]) -> Result<(), RuntimeError> {
        if !self.has(name) {
            return Ok(());
        }
        let shape: Vec<i64> = shape.iter().map(|&size| size as i64).collect();
        Ok(self.context(profile)?.set_shape(name, &shape)?)
    }

    /// Sets the shapes of all inputs whose names start so: the first dimension is the number of requests, another one that
    /// was left open is `places`.
    pub(super) fn set_named(
        &self,
        profile: usize,
        prefix: &str,
        batch: usize,
        places: usize,
    ) -> Result<(), RuntimeError> {
        for tensor in self.tensors.iter().filter(|tensor| tensor.input && tensor.name.starts_with(prefix)) {
            self.context(profile)?.set_shape(&tensor.name, &filled(&tensor.shape, batch, places))?;
        }
        Ok(())
    }

    pub(super) fn enqueue(&self, device: &Device, profile: usize) -> Result<(), RuntimeError> {
        // SAFETY: the stream is the device's own; every tensor was bound when the engine was loaded.
        Ok(unsafe { self.context(profile)?.enqueue(device.raw_stream()) }?)
    }

    /// Names of the outputs that hold results: neither caches nor the engine's own next inputs.
    pub(super) fn results(&self) -> Vec<String> {
        let own = [crate::lower::NEXT_TOKENS, crate::lower::NEXT_LENGTHS];
        let results = self.tensors.iter().filter(|tensor| !tensor.input && owner(&tensor.name) == tensor.name);
        results.map(|tensor| tensor.name.clone()).filter(|name| !own.contains(&name.as_str())).collect()
    }

    /// An output's shape and values after all work so far.
    pub(super) fn floats(
        &self,
        device: &Device,
        profile: usize,
        name: &str,
    ) -> Result<(Vec<usize>, Vec<f32>), RuntimeError> {
        let (shape, dtype) = (self.context(profile)?.shape(name)?.unwrap_or_default(), dtype(self.tensor(name)?)?);
        let bytes = device.download(self.buffer(name)?, dtype.bytes(count(&shape)))?;
        Ok((shape.iter().map(|&size| size as usize).collect(), quant::to_f32(dtype, &bytes)))
    }

    /// Copies the start of one tensor's memory over that of another.
    pub(super) fn copy(&mut self, device: &Device, from: &str, to: &str, bytes: usize) -> Result<(), RuntimeError> {
        let mut target = self.buffers.remove(to).ok_or_else(|| RuntimeError::Inconsistent { what: to.to_owned() })?;
        let copied = self.buffer(from).map(|from| device.copy(from, &mut target, 0, bytes));
        self.buffers.insert(to.to_owned(), target);
        Ok(copied??)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_dimensions_are_requests_and_places() {
        assert_eq!(filled(&[-1, 4, 512, 64], 2, 9), [2, 4, 512, 64]);
        assert_eq!(filled(&[-1, -1, 32], 2, 9), [2, 9, 32]);
        // The features of a page are always as many.
        assert_eq!(filled(&[-1, 588, 32], 2, 588), [2, 588, 32]);
    }
}
