//! The launcher on its own, for tests and tools that are not the `icebox` binary.

fn main() {
    icebox_host::launcher::launcher_main()
}
