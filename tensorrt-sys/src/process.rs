//! What a process that builds engines does to itself first.
use std::io::Error;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Makes this process die with its parent.
pub fn die_with_parent() {
    // SAFETY: it only sets a flag of this process; where it fails, the process merely outlives a killed parent.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

/// Gives this process the same addresses every time.
///
/// TensorRT-RTX orders constants by their address in places, so that with randomized addresses two builds of one
/// network give plans that differ in a few bytes. Randomization is switched off for this process and what it becomes by
/// running itself again, which does not return. Where the system forbids that, the build goes on with random addresses.
///
/// # Errors
/// Where this program cannot be started again.
pub fn steady() -> Result<(), Error> {
    // SAFETY: the call only reads flags of this process.
    let before = unsafe { libc::personality(0xffff_ffff) };
    let fixed = libc::ADDR_NO_RANDOMIZE;
    if before < 0 || before & fixed != 0 {
        return Ok(());
    }
    // SAFETY: as above; the argument is the personality in force plus one flag.
    let set = unsafe { libc::personality((before | fixed) as libc::c_ulong) };
    // SAFETY: as above.
    let now = unsafe { libc::personality(0xffff_ffff) };
    if set < 0 || now & fixed == 0 {
        return Ok(());
    }
    let mut arguments = std::env::args_os();
    let name = arguments.next();
    let mut command = Command::new("/proc/self/exe");
    if let Some(name) = name {
        command.arg0(name);
    }
    Err(command.args(arguments).exec())
}
