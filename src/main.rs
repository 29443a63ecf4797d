fn main() -> std::process::ExitCode {
    trtvlm::cli::main()
}
