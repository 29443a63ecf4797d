//! The CUDA GPU: one context, one stream, memory. Every entry to CUDA goes through [`Device::open`], which makes sure
//! that there is a driver; cudarc panics without one.
#![expect(unsafe_code, reason = "cudarc leaves to its caller what only one stream makes safe; each block says why")]
use cudarc::driver::{CudaContext, CudaGraph, CudaSlice, CudaStream, DevicePtr, DriverError, sys};
use serde::{Deserialize, Serialize};
use std::ffi::c_void;
use std::sync::Arc;
use thiserror::Error;

#[derive(Debug, Error)]
pub enum DeviceError {
    #[error("no CUDA driver was found (libcuda.so.1)")]
    NoDriver,
    #[error("the CUDA driver finds no GPU")]
    NoGpu(#[source] DriverError),
    #[error("cannot {action} on the GPU")]
    Cuda { action: &'static str, source: DriverError },
}

impl DeviceError {
    pub fn hint(&self) -> Option<String> {
        match self {
            DeviceError::NoDriver | DeviceError::NoGpu(_) => {
                Some("run where a GPU is; --target rtx builds without one, --target reference also runs".into())
            }
            DeviceError::Cuda { source, .. } if source.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                Some("other programs may hold the GPU's memory; or build with smaller sizes".into())
            }
            DeviceError::Cuda { .. } => None,
        }
    }

    fn of(action: &'static str) -> impl FnOnce(DriverError) -> DeviceError {
        move |source| DeviceError::Cuda { action, source }
    }
}

/// A kind of GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    pub name: String,
    /// Compute capability, 90 for sm90.
    pub capability: u32,
}

/// How many queues CUDA spreads streams over.
const QUEUES: &str = "CUDA_DEVICE_MAX_CONNECTIONS";

/// Bytes of device memory.
pub type Buffer = CudaSlice<u8>;

#[derive(Clone)]
pub struct Device {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
}

impl Device {
    /// The first GPU that CUDA_VISIBLE_DEVICES leaves visible.
    ///
    /// # Errors
    /// No driver or no GPU.
    pub fn open() -> Result<Device, DeviceError> {
        Device::open_at(0)
    }

    /// A GPU by its place among those visible, with a stream of its own; several may be opened on one GPU.
    ///
    /// # Errors
    /// No driver or no such GPU.
    pub fn open_at(place: usize) -> Result<Device, DeviceError> {
        Device::driver()?;
        let context = CudaContext::new(place).map_err(DeviceError::NoGpu)?;
        // SAFETY: all work on a buffer goes to the one stream made below, in order, so that none is freed or overwritten
        // before its last use; events between streams would also break the capture of graphs. What ranks read of each
        // other is no such buffer.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(DeviceError::of("make a stream"))?;
        Ok(Device { context, stream })
    }

    /// GPUs that CUDA_VISIBLE_DEVICES leaves visible.
    ///
    /// # Errors
    /// No driver or no GPU.
    pub fn count() -> Result<usize, DeviceError> {
        Device::driver()?;
        Ok(CudaContext::device_count().map_err(DeviceError::NoGpu)?.max(0) as usize)
    }

    fn driver() -> Result<(), DeviceError> {
        // SAFETY: it only tries to load libcuda, whose initializers do nothing.
        if unsafe { sys::is_culib_present() } { Ok(()) } else { Err(DeviceError::NoDriver) }
    }

    /// Lets every stream of this process have a queue of its own on the GPU, as ranks need that wait for each other there;
    /// with CUDA's eight, work of one may lie behind that of another. To be called before CUDA is used, by the only thread.
    pub fn queue_apart() {
        if std::env::var_os(QUEUES).is_none() {
            // SAFETY: no other thread reads the environment meanwhile, which is the caller's promise.
            unsafe { std::env::set_var(QUEUES, "32") };
        }
    }

    /// Makes this the GPU that the thread works on; needed once in each thread that calls CUDA or TensorRT.
    ///
    /// # Errors
    /// What the driver says.
    pub fn enter(&self) -> Result<(), DeviceError> {
        self.context.bind_to_thread().map_err(DeviceError::of("use the context"))
    }

    /// # Errors
    /// What the driver says.
    pub fn gpu(&self) -> Result<Gpu, DeviceError> {
        let failed = || DeviceError::of("ask for the kind of GPU");
        let (major, minor) = self.context.compute_capability().map_err(failed())?;
        Ok(Gpu { name: self.context.name().map_err(failed())?, capability: (major * 10 + minor) as u32 })
    }

    /// Memory that is given back stays with this process, for the next that asks: asking the driver each time takes longer
    /// than many a kernel.
    ///
    /// # Errors
    /// What the driver says.
    pub fn keep_memory(&self) -> Result<(), DeviceError> {
        let mut pool = std::ptr::null_mut();
        let mut all = u64::MAX;
        let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the device is the context's own; the attribute is a number of 64 bits in cuda.h.
        let done = unsafe {
            let found = sys::cuDeviceGetDefaultMemPool(&raw mut pool, self.context.cu_device()).result();
            found.and_then(|()| sys::cuMemPoolSetAttribute(pool, threshold, (&raw mut all).cast()).result())
        };
        done.map_err(DeviceError::of("keep memory"))
    }

    /// Bytes that nobody uses.
    ///
    /// # Errors
    /// What the driver says.
    pub fn free_memory(&self) -> Result<usize, DeviceError> {
        Ok(self.context.mem_get_info().map_err(DeviceError::of("ask for free memory"))?.0)
    }

    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// The stream as a `cudaStream_t`.
    pub fn raw_stream(&self) -> *mut c_void {
        self.stream.cu_stream().cast()
    }

    /// Zeroed memory; never of no bytes, so that it has an address.
    ///
    /// # Errors
    /// Out of memory.
    pub fn allocate(&self, bytes: usize) -> Result<Buffer, DeviceError> {
        self.stream.alloc_zeros(bytes.max(1)).map_err(DeviceError::of("allocate memory"))
    }

    /// Copies to the start of a buffer.
    ///
    /// # Errors
    /// What the driver says; more bytes than the buffer has.
    pub fn upload(&self, bytes: &[u8], to: &mut Buffer) -> Result<(), DeviceError> {
        let failed = || DeviceError::of("copy to the GPU");
        let too_long = DriverError(sys::CUresult::CUDA_ERROR_INVALID_VALUE);
        let mut view = to.try_slice_mut(..bytes.len()).ok_or(too_long).map_err(failed())?;
        self.stream.memcpy_htod(bytes, &mut view).map_err(failed())
    }

    /// The first bytes of a buffer, once all work so far is done.
    ///
    /// # Errors
    /// What the driver says, for any of the work.
    pub fn download(&self, from: &Buffer, bytes: usize) -> Result<Vec<u8>, DeviceError> {
        let failed = || DeviceError::of("copy from the GPU");
        let too_long = DriverError(sys::CUresult::CUDA_ERROR_INVALID_VALUE);
        let view = from.try_slice(..bytes).ok_or(too_long).map_err(failed())?;
        let copied = self.stream.clone_dtoh(&view).map_err(failed())?;
        self.stream.synchronize().map_err(failed())?;
        Ok(copied)
    }

    /// Copies `bytes` from the start of one buffer to `offset` of another.
    ///
    /// # Errors
    /// What the driver says; a range outside a buffer.
    pub fn copy(&self, from: &Buffer, to: &mut Buffer, offset: usize, bytes: usize) -> Result<(), DeviceError> {
        let failed = || DeviceError::of("copy within the GPU");
        let outside = DriverError(sys::CUresult::CUDA_ERROR_INVALID_VALUE);
        let view = from.try_slice(..bytes).ok_or(outside).map_err(failed())?;
        let mut target = to.try_slice_mut(offset..offset + bytes).ok_or(outside).map_err(failed())?;
        self.stream.memcpy_dtod(&view, &mut target).map_err(failed())
    }

    /// # Errors
    /// What the driver says, for any of the work so far.
    pub fn wait(&self) -> Result<(), DeviceError> {
        self.stream.synchronize().map_err(DeviceError::of("finish the work"))
    }

    pub fn address(&self, buffer: &Buffer) -> u64 {
        buffer.device_ptr(&self.stream).0
    }

    /// Records what `work` puts on the stream, without running it.
    ///
    /// # Errors
    /// Work that cannot be recorded.
    pub fn record<E: From<DeviceError>>(&self, work: impl FnOnce() -> Result<(), E>) -> Result<CudaGraph, E> {
        let failed = || DeviceError::of("record a graph");
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(failed())?;
        // The recording is ended whatever happens, or the stream is of no use any more.
        let done = work();
        let graph = self.stream.end_capture(sys::CUgraphInstantiate_flags(0));
        done?;
        let nothing = DriverError(sys::CUresult::CUDA_ERROR_UNKNOWN);
        let graph = graph.and_then(|graph| graph.ok_or(nothing)).map_err(failed())?;
        graph.upload().map_err(failed())?;
        Ok(graph)
    }

    /// Runs a recorded graph.
    ///
    /// # Errors
    /// What the driver says.
    pub fn replay(&self, graph: &CudaGraph) -> Result<(), DeviceError> {
        graph.launch().map_err(DeviceError::of("run a graph"))
    }

    /// Milliseconds of device time that `work` takes, by events around it.
    ///
    /// # Errors
    /// Whatever `work` fails with.
    pub fn time<E: From<DeviceError>>(&self, work: impl FnOnce() -> Result<(), E>) -> Result<f64, E> {
        let failed = || DeviceError::of("measure time");
        let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let start = self.stream.record_event(flags).map_err(failed())?;
        work()?;
        let end = self.stream.record_event(flags).map_err(failed())?;
        end.synchronize().map_err(failed())?;
        Ok(start.elapsed_ms(&end).map_err(failed())?.into())
    }
}
