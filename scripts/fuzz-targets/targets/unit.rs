//! See `nydus_vm_fuzz::unit`.
#![no_main]

libfuzzer_sys::fuzz_target!(init: nydus_vm_fuzz::seeds::write(nydus_vm_fuzz::unit::seeds), |data: &[u8]| nydus_vm_fuzz::unit::run(data));

libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    nydus_vm_fuzz::mutate::fields(data, size, max_size, seed)
});
