//! See `nydus_vm_fuzz::bootstrap`.
#![no_main]

libfuzzer_sys::fuzz_target!(init: nydus_vm_fuzz::seeds::write(nydus_vm_fuzz::bootstrap::seeds_v5), |data: &[u8]| nydus_vm_fuzz::bootstrap::run(data));

libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    nydus_vm_fuzz::mutate::fields(data, size, max_size, seed)
});
