//! NCCL, NVIDIA's library for ranks on GPUs of one machine or several, loaded at run time; each rank has a GPU of its own.
use super::communicator::{CommunicatorError, Work};
use super::kernel::Launch;
use super::local::THREADS;
use graphs::DType;
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tensorrt_sys::PluginCall;

/// Kernels that put rows together for it, and apart.
pub(super) const GATHER: &str = "gather_rows";
pub(super) const JOIN: &str = "join_rows";

/// Names under which the library is looked for.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// By what ranks find each other: made by one, handed to all.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct UniqueId(pub [u8; 128]);

type Comm = *mut c_void;

/// One rank's communicator.
pub(super) struct Nccl {
    comm: AtomicPtr<c_void>,
    /// Held while the communicator is called: it must not go meanwhile.
    busy: Mutex<()>,
    rank: usize,
}

/// How long a call of NCCL may hold up the end of its communicator.
const HOLD: Duration = Duration::from_secs(1);

fn library() -> Result<&'static Library, CommunicatorError> {
    static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
    let open = || {
        let mut reasons = Vec::new();
        for name in NAMES {
            // SAFETY: loading runs the library's initializers, which do nothing but set it up.
            match unsafe { Library::new(name) } {
                Ok(library) => return Ok(library),
                Err(error) => reasons.push(error.to_string()),
            }
        }
        Err(reasons.join("; "))
    };
    LIBRARY.get_or_init(open).as_ref().map_err(|reason| CommunicatorError::NoNccl { reason: reason.clone() })
}

fn symbol<T: Copy>(name: &str) -> Result<T, CommunicatorError> {
    // SAFETY: each caller names the type that nccl.h declares for the symbol, the same in every version 2.
    let found = unsafe { library()?.get::<T>(name.as_bytes()).map(|symbol| *symbol) };
    found.map_err(|error| CommunicatorError::NoNccl { reason: error.to_string() })
}

fn check(action: &'static str, status: c_int) -> Result<(), CommunicatorError> {
    if status == 0 {
        return Ok(());
    }
    let text: unsafe extern "C" fn(c_int) -> *const c_char = symbol("ncclGetErrorString")?;
    // SAFETY: it gives a constant string for every status.
    let reason = unsafe { CStr::from_ptr(text(status)) }.to_string_lossy().into_owned();
    Err(CommunicatorError::Nccl { action, reason })
}

impl UniqueId {
    /// # Errors
    /// No NCCL here, or none that works.
    pub fn new() -> Result<UniqueId, CommunicatorError> {
        let make: unsafe extern "C" fn(*mut UniqueId) -> c_int = symbol("ncclGetUniqueId")?;
        let mut id = UniqueId([0; 128]);
        // SAFETY: it writes 128 bytes.
        check("make an id for the ranks", unsafe { make(&raw mut id) })?;
        Ok(id)
    }
}

impl Nccl {
    /// Joins the other ranks on the GPU whose context is current; returns when all are there.
    pub(super) fn new(id: UniqueId, rank: usize, ranks: usize) -> Result<Nccl, CommunicatorError> {
        let start: unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int) -> c_int = symbol("ncclCommInitRank")?;
        let mut comm: Comm = std::ptr::null_mut();
        // SAFETY: the id is passed by value, as nccl.h has it; the communicator is kept and ended once.
        check("join the ranks", unsafe { start(&raw mut comm, ranks as c_int, id, rank as c_int) })?;
        Ok(Nccl { comm: AtomicPtr::new(comm), busy: Mutex::new(()), rank })
    }

    fn hold(&self) -> MutexGuard<'_, ()> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends all that waits for other ranks on the GPU; may be called while another thread is in a call that hangs.
    pub(super) fn abort(&self) {
        let start = Instant::now();
        let mut guard = self.busy.try_lock();
        while guard.is_err() && start.elapsed() < HOLD {
            std::thread::sleep(Duration::from_millis(1));
            guard = self.busy.try_lock();
        }
        let comm = self.comm.swap(std::ptr::null_mut(), Ordering::SeqCst);
        let abort: Result<unsafe extern "C" fn(Comm) -> c_int, _> = symbol("ncclCommAbort");
        if let (false, Ok(abort)) = (comm.is_null(), abort) {
            // SAFETY: it was taken out above, so that it is ended once.
            unsafe { abort(comm) };
        }
    }

    pub(super) fn check(&self) -> Result<(), String> {
        let _busy = self.hold();
        let comm = self.comm.load(Ordering::SeqCst);
        if comm.is_null() {
            return Err(format!("rank {} has stopped", self.rank));
        }
        let ask: unsafe extern "C" fn(Comm, *mut c_int) -> c_int =
            symbol("ncclCommGetAsyncError").map_err(|error| error.to_string())?;
        let mut status = 0;
        // SAFETY: the communicator is alive; the result goes to a number of ours.
        check("ask for errors", unsafe { ask(comm, &raw mut status) }).map_err(|error| error.to_string())?;
        check("go on", status).map_err(|error| error.to_string())
    }

    pub(super) fn join(&self, ranks: usize, work: &Work<'_>, call: &PluginCall<'_>) -> Result<(), String> {
        let ([input], [output]) = (call.inputs, call.outputs) else { return Err("it has other tensors".into()) };
        let _busy = self.hold();
        let comm = self.comm.load(Ordering::SeqCst);
        if comm.is_null() {
            return Err("the ranks have stopped".into());
        }
        // ncclFloat16, ncclFloat32, ncclBfloat16; ncclSum.
        let kind: c_int = match work.dtype {
            DType::Float16 => 6,
            DType::Bfloat16 => 9,
            _ => 7,
        };
        let sum: c_int = 0;
        let told = |error: CommunicatorError| error.to_string();
        if work.width == 0 {
            type Reduce =
                unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int;
            let reduce: Reduce = symbol("ncclAllReduce").map_err(told)?;
            let (from, to) = (input.address as *const c_void, output.address as *mut c_void);
            // SAFETY: both tensors have so many elements of the type.
            let status = unsafe { reduce(from, to, work.count, kind, sum, comm, call.stream) };
            return check("add up the ranks' parts", status).map_err(told);
        }
        type Gather = unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Comm, *mut c_void) -> c_int;
        let gather: Gather = symbol("ncclAllGather").map_err(told)?;
        // A single row is in place already.
        let one = work.count == work.width;
        let all = call.workspace;
        let own = if one { input.address } else { all + work.dtype.bytes(ranks * work.count) as u64 };
        let joined = if one { output.address } else { all };
        if !one {
            rows(GATHER, work, call, input.address, own, ranks)?;
        }
        // SAFETY: the workspace has room for all parts and one more, the output for all.
        let status =
            unsafe { gather(own as *const c_void, joined as *mut c_void, work.count, kind, comm, call.stream) };
        check("gather the ranks' parts", status).map_err(told)?;
        if one { Ok(()) } else { rows(JOIN, work, call, joined, output.address, ranks) }
    }
}

/// One of the two kernels that move rows.
fn rows(
    name: &'static str,
    work: &Work<'_>,
    call: &PluginCall<'_>,
    mut from: u64,
    mut to: u64,
    ranks: usize,
) -> Result<(), String> {
    let number = |value: usize| i32::try_from(value).map_err(|error| error.to_string());
    let (mut count, mut width, mut ranks) = (work.count as i64, number(work.width)?, number(ranks)?);
    let arguments = &mut [
        (&raw mut from).cast::<c_void>(),
        (&raw mut to).cast(),
        (&raw mut count).cast(),
        (&raw mut width).cast(),
        (&raw mut ranks).cast(),
    ];
    let launch =
        Launch { grid: [work.count.div_ceil(THREADS).clamp(1, 1024), 1, 1], threads: THREADS as u32, shared: 0 };
    // SAFETY: the arguments are those of the kernels in collective.cu; tensors and workspace are as large as they go.
    unsafe { work.kernels.launch(name, launch, call.stream, arguments) }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        let comm = self.comm.swap(std::ptr::null_mut(), Ordering::SeqCst);
        let destroy: Result<unsafe extern "C" fn(Comm) -> c_int, _> = symbol("ncclCommDestroy");
        if let (false, Ok(destroy)) = (comm.is_null(), destroy) {
            // SAFETY: it was taken out above, so that it is ended once; the engines that used it are done.
            unsafe { destroy(comm) };
        }
    }
}
