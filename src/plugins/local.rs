//! Ranks in the threads of one process, on one GPU or on several that reach each other's memory.
//!
//! A recorded launch waits for the other ranks on the GPU. For that their kernels must be able to run at the same time, which
//! they are not while a kernel is loaded for the first time, memory is freed or a graph is made. What is not recorded is
//! therefore ordered by events, and the threads meet between them; a recording is made only of what has run so before.
use super::communicator::{Communicator, CommunicatorError, Work};
use super::kernel::Launch;
use crate::device::{Device, DeviceError};
use cudarc::driver::{result, sys};
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;
use tensorrt_sys::PluginCall;

/// As in collective.cu: ranks at most, blocks of a launch at most, threads of a block, bytes of one slot.
pub(super) const LIMIT: usize = 8;
const BLOCKS: usize = 16;
pub(super) const THREADS: usize = 512;
const SHARE: usize = 32 << 10;

const SHARES: i32 = 1;
const TAKES: i32 = 2;
const WAITS: i32 = 4;

pub(super) const KERNEL: &str = "join";

/// Bytes of one set of slots, and of a rank's memory: a set for launches that wait, one for those that do not, the flags
/// of other ranks, its own rounds.
const SLOTS: usize = BLOCKS * 2 * SHARE;
const FLAGS: usize = LIMIT * BLOCKS * size_of::<u32>();
const MEMORY: usize = 2 * SLOTS + FLAGS + 2 * BLOCKS * size_of::<u32>();

/// `Group` in collective.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct Group {
    slots: [u64; LIMIT],
    arrived: [u64; LIMIT],
    rounds: u64,
    stop: u64,
    late: u64,
    patience: u64,
    rank: i32,
    ranks: i32,
}

pub(super) struct Local {
    shared: Arc<Shared>,
    rank: usize,
    /// Launches ordered by events so far.
    turns: AtomicUsize,
}

/// Memory of all ranks; the last one to go frees it.
struct Shared {
    devices: Vec<Device>,
    memory: Vec<u64>,
    /// Two for each rank: what was shared last, and before.
    events: Vec<[usize; 2]>,
    /// Page-locked: who made all ranks stop, plus one; then for each rank whom it waited for in vain, plus one.
    words: usize,
    patience: Duration,
}

fn cuda(action: &'static str) -> impl FnOnce(result::DriverError) -> DeviceError {
    move |source| DeviceError::Cuda { action, source }
}

impl Local {
    /// A way for each of the devices.
    pub(super) fn all(devices: &[Device], patience: Duration) -> Result<Vec<Local>, CommunicatorError> {
        let ranks = devices.len();
        if ranks > LIMIT {
            return Err(CommunicatorError::TooMany { ranks });
        }
        connect(devices)?;
        let mut shared =
            Shared { devices: devices.to_vec(), memory: Vec::new(), events: Vec::new(), words: 0, patience };
        for device in devices {
            device.enter()?;
            // SAFETY: the device's context is current; what is made here is kept by `shared`, which frees it.
            unsafe {
                // Memory of a pool could not be reached from other GPUs.
                let address = result::malloc_sync(MEMORY).map_err(cuda("allocate memory"))?;
                shared.memory.push(address);
                result::memset_d8_sync(address, 0, MEMORY).map_err(cuda("clear memory"))?;
            }
            let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
            let pair = [event().map_err(cuda("make an event"))?, event().map_err(cuda("make an event"))?];
            shared.events.push(pair.map(|event| event as usize));
        }
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: a context is current; the words are zeroed before anybody sees them, and freed by `shared`.
        unsafe {
            let words = result::malloc_host((LIMIT + 1) * size_of::<u32>(), flags).map_err(cuda("allocate memory"))?;
            words.cast::<u8>().write_bytes(0, (LIMIT + 1) * size_of::<u32>());
            shared.words = words as usize;
        }
        let shared = Arc::new(shared);
        let one = |rank| Local { shared: Arc::clone(&shared), rank, turns: AtomicUsize::new(0) };
        Ok((0..ranks).map(one).collect())
    }

    /// Makes every rank stop waiting on the GPU.
    pub(super) fn stop(&self, rank: usize) {
        let _ = self.shared.word(0).compare_exchange(0, rank as u32 + 1, Ordering::SeqCst, Ordering::SeqCst);
    }

    pub(super) fn check(&self, rank: usize) -> Result<(), String> {
        let of = |place: usize| (self.shared.word(place).load(Ordering::SeqCst) as usize).checked_sub(1);
        match (of(1 + rank), of(0)) {
            (Some(late), _) => Err(format!("rank {late} did not come within {:?}", self.shared.patience)),
            (None, Some(gone)) if gone != rank => Err(format!("rank {gone} has stopped")),
            _ => Ok(()),
        }
    }

    pub(super) fn join(&self, group: &Communicator, work: &Work<'_>, call: &PluginCall<'_>) -> Result<(), String> {
        let size = work.dtype.bytes(1).max(1);
        let pack = 16 / size;
        let most = SHARE / size;
        // SAFETY: the stream is the one that TensorRT was given.
        let capturing =
            unsafe { result::stream::is_capturing(call.stream.cast()) }.map_err(|error| error.to_string())?;
        if capturing != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE {
            // As many blocks as have a pack for each thread, but few: those of all ranks must run at the same time.
            let blocks = work.count.div_ceil(THREADS * pack).clamp(1, BLOCKS);
            let each = work.count.div_ceil(blocks).next_multiple_of(pack).min(most);
            return self.launch(work, call, blocks, each, 0..work.count, SHARES | TAKES | WAITS, 0);
        }
        for start in (0..work.count).step_by(BLOCKS * most) {
            let end = work.count.min(start + BLOCKS * most);
            let each = (end - start).div_ceil(BLOCKS).next_multiple_of(pack).min(most);
            let slot = self.turns.fetch_add(1, Ordering::Relaxed) % 2;
            self.launch(work, call, BLOCKS, each, start..end, SHARES, slot)?;
            self.order(group, call.stream.cast(), slot)?;
            self.launch(work, call, BLOCKS, each, start..end, TAKES, slot)?;
        }
        Ok(())
    }

    /// Lets the stream wait until every rank has shared. A slot is written again two turns later: what wrote it then waited
    /// for events that the others recorded after they had read it.
    fn order(&self, group: &Communicator, stream: sys::CUstream, slot: usize) -> Result<(), String> {
        let failed = |error: result::DriverError| format!("the ranks cannot be ordered: {error}");
        for (rank, events) in self.shared.events.iter().enumerate() {
            if rank == self.rank {
                // SAFETY: the event and the stream are of this rank's device.
                unsafe { result::event::record(events[slot] as sys::CUevent, stream) }.map_err(failed)?;
            }
        }
        group.meet()?;
        for (rank, events) in self.shared.events.iter().enumerate() {
            if rank != self.rank {
                let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
                // SAFETY: events live as long as `shared`; those of other devices may be waited for.
                unsafe { result::stream::wait_event(stream, events[slot] as sys::CUevent, flags) }.map_err(failed)?;
            }
        }
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "they are the kernel's")]
    fn launch(
        &self,
        work: &Work<'_>,
        call: &PluginCall<'_>,
        blocks: usize,
        each: usize,
        range: std::ops::Range<usize>,
        mut phase: i32,
        slot: usize,
    ) -> Result<(), String> {
        let ([input], [output]) = (call.inputs, call.outputs) else { return Err("it has other tensors".into()) };
        let mut group = self.shared.group(self.rank, phase & WAITS != 0);
        let (mut input, mut output) = (input.address, output.address);
        let (mut start, mut end) = (range.start as i64, range.end as i64);
        let number = |value: usize| i32::try_from(value).map_err(|error| error.to_string());
        let (mut each, mut width, mut slot) = (number(each)?, number(work.width)?, number(slot)?);
        let arguments = &mut [
            (&raw mut group).cast::<c_void>(),
            (&raw mut input).cast(),
            (&raw mut output).cast(),
            (&raw mut start).cast(),
            (&raw mut end).cast(),
            (&raw mut each).cast(),
            (&raw mut width).cast(),
            (&raw mut phase).cast(),
            (&raw mut slot).cast(),
        ];
        let launch = Launch { grid: [blocks, 1, 1], threads: THREADS as u32, shared: 0 };
        // SAFETY: the arguments are those of the kernel in collective.cu; the tensors have `range.end` elements or, where
        // parts are put side by side, as many of each rank, by their shapes.
        unsafe { work.kernels.launch(KERNEL, launch, call.stream, arguments) }
    }
}

impl Shared {
    fn word(&self, place: usize) -> &AtomicU32 {
        let words = self.words as *mut u32;
        // SAFETY: there are LIMIT + 1 aligned words, which live as long as `self` and are only used as atomics; `place` is 0
        // or a rank plus one.
        unsafe { AtomicU32::from_ptr(words.add(place.min(LIMIT))) }
    }

    fn group(&self, rank: usize, waits: bool) -> Group {
        let at = |rank: usize, offset: usize| self.memory.get(rank).map_or(0, |address| address + offset as u64);
        let (slots, flags) = (if waits { 0 } else { SLOTS }, 2 * SLOTS);
        let word = |place: usize| std::ptr::from_ref(self.word(place)) as u64;
        Group {
            slots: std::array::from_fn(|rank| at(rank, slots)),
            arrived: std::array::from_fn(|rank| at(rank, flags)),
            rounds: at(rank, flags + FLAGS),
            // Memory that is page-locked for all has the same address on the GPUs.
            stop: word(0),
            late: word(1 + rank),
            patience: u64::try_from(self.patience.as_nanos()).unwrap_or(u64::MAX),
            rank: rank as i32,
            ranks: self.devices.len() as i32,
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        for (device, &address) in std::iter::zip(&self.devices, &self.memory) {
            // SAFETY: no rank is left that could use it. What fails here was freed with its context.
            let _ = device.enter().map(|()| unsafe { result::free_sync(address) });
        }
        for (device, events) in std::iter::zip(&self.devices, &self.events) {
            for &event in events {
                // SAFETY: as above.
                let _ = device.enter().map(|()| unsafe { result::event::destroy(event as sys::CUevent) });
            }
        }
        if self.words != 0 {
            // SAFETY: as above.
            let _ = unsafe { result::free_host(self.words as *mut c_void) };
        }
    }
}

/// Lets different GPUs reach each other's memory.
fn connect(devices: &[Device]) -> Result<(), CommunicatorError> {
    for (place, device) in devices.iter().enumerate() {
        for (other_place, other) in devices.iter().enumerate() {
            let (own, theirs) = (device.stream().context(), other.stream().context());
            if own.cu_device() == theirs.cu_device() {
                continue;
            }
            device.enter()?;
            let mut reaches = 0;
            // SAFETY: both devices and contexts are alive; the result goes to a number of ours.
            let enabled = unsafe {
                let asked = sys::cuDeviceCanAccessPeer(&raw mut reaches, own.cu_device(), theirs.cu_device());
                asked.result().map_err(cuda("ask for peer access"))?;
                sys::cuCtxEnablePeerAccess(theirs.cu_ctx(), 0)
            };
            let already = enabled == sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED;
            if reaches == 0 {
                return Err(CommunicatorError::NoPeer(place, other_place));
            }
            if !already {
                enabled.result().map_err(cuda("enable peer access"))?;
            }
        }
    }
    Ok(())
}
