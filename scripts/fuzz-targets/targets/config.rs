//! See `nydus_vm_fuzz::config`.
#![no_main]

libfuzzer_sys::fuzz_target!(init: nydus_vm_fuzz::seeds::write(nydus_vm_fuzz::config::seeds), |data: &[u8]| nydus_vm_fuzz::config::run(data));
