//! Building engines.
use crate::abi::{Dims, Object, call, delete, word};
use crate::network::Network;
use crate::progress::{Listener, Monitor};
use crate::slots::{builder, builder_config, host_memory, network_definition, optimization_profile, timing_cache};
use crate::stream::{BuildSummary, StreamWriter};
use crate::{BuilderFlag, Error, Family, Library, OptProfileSelector, PreviewFeature, ProfilingVerbosity, Result};
use std::ffi::{CString, c_char};
use std::io::Write;
use std::rc::Rc;

/// TensorRT's builder object, shared with the networks made from it.
pub(crate) struct BuilderObject {
    pub(crate) library: &'static Library,
    object: Object,
}

impl Drop for BuilderObject {
    fn drop(&mut self) {
        delete(self.object);
    }
}

pub struct Builder {
    inner: Rc<BuilderObject>,
}

/// The range of one input's shape, dimension by dimension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShapeRange {
    pub input: String,
    pub min: Vec<i64>,
    pub opt: Vec<i64>,
    pub max: Vec<i64>,
}

/// What an engine is built for.
#[derive(Clone, Debug, Default)]
pub struct BuildOptions {
    /// One list of ranges per optimization profile.
    pub profiles: Vec<Vec<ShapeRange>>,
    /// TensorRT-RTX: the GPUs that the engine is for, as compute capabilities (89 for sm89).
    pub compute_capabilities: Vec<u32>,
    /// Keep the builder's description of the layers.
    pub describe: bool,
    /// How much the builder tries, 0 to 5; TensorRT's own choice where nothing is said.
    pub optimization_level: Option<i32>,
    /// What an earlier build measured (TensorRT 10 and later); one of another version or GPU is not used.
    pub timing_cache: Option<Vec<u8>>,
    /// The engine uses the stream that it is run on and no others (TensorRT 10 and later).
    pub one_stream: bool,
}

impl Builder {
    /// # Errors
    /// A library that cannot build here.
    pub fn new(library: &'static Library) -> Result<Builder> {
        let object = library.builder()?;
        let inner = BuilderObject { library, object };
        if library.family() == Family::Rtx {
            // With several threads, which of them takes memory first shows in TensorRT-RTX's plans.
            call!(library.family(), word(object, 1), builder::SET_MAX_THREADS, (1 => i32) -> bool)?;
        }
        Ok(Builder { inner: Rc::new(inner) })
    }

    /// An empty strongly typed network whose constants live for `'w`.
    ///
    /// # Errors
    /// Where TensorRT gives none.
    pub fn network<'w>(&self, name: &str) -> Result<Network<'w>> {
        let family = self.inner.library.family();
        let flag = crate::NetworkDefinitionCreationFlag::StronglyTyped.value(family).unwrap_or(0);
        let object =
            call!(family, word(self.inner.object, 1), builder::CREATE_NETWORK_V2, (1u32 << flag => u32) -> Object)?;
        if object.is_null() {
            return Err(self.inner.library.refused());
        }
        let network = Network::new(Rc::clone(&self.inner), object);
        // The name goes into the plan; left alone it would count the networks of this process.
        let text = Network::text(name)?;
        call!(family, network.this(), network_definition::SET_NAME, (text.as_ptr() => *const c_char) -> ())?;
        Ok(network)
    }

    /// Builds the engine and writes it as it is made; `progress` may stop the build.
    ///
    /// # Errors
    /// [`Error::Refused`] with TensorRT's messages, [`Error::Cancelled`], or a failing write.
    pub fn build_to(
        &self,
        network: &Network<'_>,
        options: &BuildOptions,
        out: &mut dyn Write,
        progress: &mut Listener<'_>,
    ) -> Result<BuildSummary> {
        let library = self.inner.library;
        let family = library.family();
        library.log.take_errors();
        let config = Config::new(&self.inner, options)?;
        let monitor = Monitor::new(progress);
        let (implementation, monitor_object) = (word(config.object, 1), monitor.object());
        call!(family, implementation, builder_config::SET_PROGRESS_MONITOR, (monitor_object => Object) -> ())?;
        let mut writer = StreamWriter::new(out);
        let this = word(self.inner.object, 1);
        let (network, object) = (network.object(), config.object);
        let built = if library.has(builder::BUILD_SERIALIZED_NETWORK_TO_STREAM) {
            let stream = writer.object();
            call!(family, this, builder::BUILD_SERIALIZED_NETWORK_TO_STREAM,
                (network => Object, object => Object, stream => Object) -> bool)?
        } else {
            let memory = call!(family, this, builder::BUILD_SERIALIZED_NETWORK,
                (network => Object, object => Object) -> Object)?;
            let plan = host_bytes(family, memory)?;
            let built = plan.map(|plan| writer.write(plan)).is_some();
            delete(memory);
            built
        };
        if monitor.cancelled() {
            return Err(Error::Cancelled);
        }
        let mut summary = writer.finish().map_err(Error::Write)?;
        if !built || summary.bytes == 0 {
            return Err(library.refused());
        }
        summary.timing_cache = config.measured()?;
        Ok(summary)
    }

    /// The builder's description of the layers of the last engine built with [`BuildOptions::describe`].
    pub fn take_description(&self) -> Option<String> {
        self.inner.library.log.take_layers()
    }
}

/// A builder config with the timing cache that it uses.
struct Config {
    library: &'static Library,
    object: Object,
    cache: Object,
}

impl Drop for Config {
    fn drop(&mut self) {
        delete(self.object);
        delete(self.cache);
    }
}

impl Config {
    fn new(inner: &BuilderObject, options: &BuildOptions) -> Result<Config> {
        let library = inner.library;
        let family = library.family();
        let object = call!(family, word(inner.object, 1), builder::CREATE_BUILDER_CONFIG, () -> Object)?;
        let mut config = Config { library, object, cache: std::ptr::null_mut() };
        let this = word(config.object, 1);
        if family != Family::Rtx {
            // Plugins that change an input in place need it; TensorRT-RTX has no plugins.
            if let Some(feature) = PreviewFeature::AliasedPluginIo1003.value(family) {
                call!(family, this, builder_config::SET_PREVIEW_FEATURE, (feature => i32, true => bool) -> ())?;
            }
            // float32 is what was asked for: products of 10 bits of mantissa (TF32) are not.
            if let Some(flag) = BuilderFlag::Tf32.value(family) {
                call!(family, this, builder_config::CLEAR_FLAG, (flag => i32) -> ())?;
            }
            if options.one_stream {
                call!(family, this, builder_config::SET_MAX_AUX_STREAMS, (0 => i32) -> ())?;
            }
            config.remember(options.timing_cache.as_deref().unwrap_or_default())?;
        }
        if let Some(level) = options.optimization_level {
            call!(family, this, builder_config::SET_BUILDER_OPTIMIZATION_LEVEL, (level => i32) -> ())?;
        }
        if options.describe {
            let value = ProfilingVerbosity::Detailed.value(family).unwrap_or(0);
            call!(family, this, builder_config::SET_PROFILING_VERBOSITY, (value => i32) -> ())?;
        }
        if !options.compute_capabilities.is_empty() {
            let count = options.compute_capabilities.len() as i32;
            let accepted = call!(family, this, builder_config::SET_NB_COMPUTE_CAPABILITIES, (count => i32) -> bool)?;
            let mut all = accepted;
            for (place, capability) in options.compute_capabilities.iter().enumerate() {
                let (capability, place) = (*capability as i32, place as i32);
                all &= call!(family, this, builder_config::SET_COMPUTE_CAPABILITY,
                    (capability => i32, place => i32) -> bool)?;
            }
            if !all {
                return Err(library.refused());
            }
        }
        for ranges in &options.profiles {
            let profile = call!(family, word(inner.object, 1), builder::CREATE_OPTIMIZATION_PROFILE, () -> Object)?;
            let this_profile = word(profile, 1);
            for range in ranges {
                set_range(library, this_profile, range)?;
            }
            let index = call!(family, this, builder_config::ADD_OPTIMIZATION_PROFILE, (profile => Object) -> i32)?;
            if index < 0 {
                return Err(library.refused());
            }
        }
        Ok(config)
    }

    /// Starts from what an earlier build measured; one of another version or GPU is left aside.
    fn remember(&mut self, measured: &[u8]) -> Result<()> {
        let (family, this) = (self.library.family(), word(self.object, 1));
        for bytes in [measured, &[]] {
            self.cache = call!(family, this, builder_config::CREATE_TIMING_CACHE,
                (bytes.as_ptr() => *const u8, bytes.len() => usize) -> Object)?;
            let (cache, of_any_gpu) = (self.cache, false);
            let accepted = !cache.is_null()
                && call!(family, this, builder_config::SET_TIMING_CACHE, (cache => Object, of_any_gpu => bool) -> bool)?;
            if accepted {
                break;
            }
            delete(std::mem::replace(&mut self.cache, std::ptr::null_mut()));
        }
        self.library.log.take_errors();
        Ok(())
    }

    /// What the builder has measured so far.
    fn measured(&self) -> Result<Option<Vec<u8>>> {
        if self.cache.is_null() {
            return Ok(None);
        }
        let family = self.library.family();
        let memory = call!(family, word(self.cache, 1), timing_cache::SERIALIZE, () -> Object)?;
        let bytes = host_bytes(family, memory)?.map(<[u8]>::to_vec);
        delete(memory);
        Ok(bytes)
    }
}

/// The bytes of an `IHostMemory`, until it is deleted.
fn host_bytes<'m>(family: Family, memory: Object) -> Result<Option<&'m [u8]>> {
    if memory.is_null() {
        return Ok(None);
    }
    let data = call!(family, word(memory, 1), host_memory::DATA, () -> *const u8)?;
    let size = call!(family, word(memory, 1), host_memory::SIZE, () -> usize)?;
    // SAFETY: TensorRT gives `size` bytes at `data` that live as long as the object.
    Ok(Some(unsafe { std::slice::from_raw_parts(data, size) }))
}

fn set_range(library: &Library, profile: Object, range: &ShapeRange) -> Result<()> {
    let family = library.family();
    let name =
        CString::new(range.input.as_str()).map_err(|_| Error::argument(&range.input, "the name holds a zero byte"))?;
    let ordered = range.min.len() == range.opt.len()
        && range.opt.len() == range.max.len()
        && std::iter::zip(&range.min, &range.opt).all(|(min, opt)| 0 <= *min && min <= opt)
        && std::iter::zip(&range.opt, &range.max).all(|(opt, max)| opt <= max);
    if !ordered {
        let reason = format!("the range {:?} .. {:?} .. {:?} is not ordered", range.min, range.opt, range.max);
        return Err(Error::argument(&range.input, reason));
    }
    let selected = [
        (OptProfileSelector::Min, &range.min),
        (OptProfileSelector::Opt, &range.opt),
        (OptProfileSelector::Max, &range.max),
    ];
    for (selector, sizes) in selected {
        let dims = Dims::new(sizes).ok_or_else(|| Error::argument(&range.input, "more than 8 dimensions"))?;
        let selector = selector.value(family).unwrap_or(0);
        let accepted = call!(family, profile, optimization_profile::SET_DIMENSIONS,
            (name.as_ptr() => *const c_char, selector => i32, &raw const dims => *const Dims) -> bool)?;
        if !accepted {
            return Err(library.refused());
        }
    }
    Ok(())
}
