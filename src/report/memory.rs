//! What a run took.

/// The most memory that this process has held at once, in bytes; nothing where the system does not say.
pub fn peak_memory() -> Option<u64> {
    peak_of(&std::fs::read_to_string("/proc/self/status").ok()?)
}

fn peak_of(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    #[test]
    fn reads_the_line_of_the_peak() {
        let status = "Name:\tx\nVmPeak:\t   90 kB\nVmHWM:\t   17 kB\nVmRSS:\t    5 kB\n";
        assert_eq!(super::peak_of(status), Some(17 * 1024));
        assert_eq!(super::peak_of("VmHWM: many"), None);
    }
}
