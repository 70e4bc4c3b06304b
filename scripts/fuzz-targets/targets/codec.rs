//! See `nydus_vm_fuzz::codec`.
#![no_main]

libfuzzer_sys::fuzz_target!(init: nydus_vm_fuzz::seeds::write(nydus_vm_fuzz::codec::seeds), |data: &[u8]| nydus_vm_fuzz::codec::run(data));
