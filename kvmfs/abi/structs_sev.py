# SPDX-License-Identifier: GPL-2.0-or-later
"""Structs of the SEV, SEV-ES and SEV-SNP commands of KVM_MEMORY_ENCRYPT_OP (asm/kvm.h).

Re-exported by kvmfs.abi.structs.
"""

from ctypes import Array, c_uint8, c_uint32, c_uint64
from typing import Annotated

from .cstruct import U8, U16, U32, U64, Structure, layout


@layout
class KvmSevCmd(Structure):
    """struct kvm_sev_cmd."""

    id: U32
    pad0: U32
    data: U64
    error: U32
    sev_fd: U32


@layout
class KvmSevInit(Structure):
    """struct kvm_sev_init."""

    vmsa_features: U64
    flags: U32
    ghcb_version: U16
    pad1: U16
    pad2: Annotated[Array[c_uint32], c_uint32 * 8]


@layout
class KvmSevLaunchStart(Structure):
    """struct kvm_sev_launch_start."""

    handle: U32
    policy: U32
    dh_uaddr: U64
    dh_len: U32
    pad0: U32
    session_uaddr: U64
    session_len: U32
    pad1: U32


@layout
class KvmSevLaunchUpdateData(Structure):
    """struct kvm_sev_launch_update_data."""

    uaddr: U64
    len: U32
    pad0: U32


@layout
class KvmSevLaunchSecret(Structure):
    """struct kvm_sev_launch_secret."""

    hdr_uaddr: U64
    hdr_len: U32
    pad0: U32
    guest_uaddr: U64
    guest_len: U32
    pad1: U32
    trans_uaddr: U64
    trans_len: U32
    pad2: U32


@layout
class KvmSevLaunchMeasure(Structure):
    """struct kvm_sev_launch_measure."""

    uaddr: U64
    len: U32
    pad0: U32


@layout
class KvmSevGuestStatus(Structure):
    """struct kvm_sev_guest_status."""

    handle: U32
    policy: U32
    state: U32


@layout
class KvmSevDbg(Structure):
    """struct kvm_sev_dbg."""

    src_uaddr: U64
    dst_uaddr: U64
    len: U32
    pad0: U32


@layout
class KvmSevAttestationReport(Structure):
    """struct kvm_sev_attestation_report."""

    mnonce: Annotated[Array[c_uint8], c_uint8 * 16]
    uaddr: U64
    len: U32
    pad0: U32


@layout
class KvmSevSendStart(Structure):
    """struct kvm_sev_send_start."""

    policy: U32
    pad0: U32
    pdh_cert_uaddr: U64
    pdh_cert_len: U32
    pad1: U32
    plat_certs_uaddr: U64
    plat_certs_len: U32
    pad2: U32
    amd_certs_uaddr: U64
    amd_certs_len: U32
    pad3: U32
    session_uaddr: U64
    session_len: U32
    pad4: U32


@layout
class KvmSevSendUpdateData(Structure):
    """struct kvm_sev_send_update_data."""

    hdr_uaddr: U64
    hdr_len: U32
    pad0: U32
    guest_uaddr: U64
    guest_len: U32
    pad1: U32
    trans_uaddr: U64
    trans_len: U32
    pad2: U32


@layout
class KvmSevReceiveStart(Structure):
    """struct kvm_sev_receive_start."""

    handle: U32
    policy: U32
    pdh_uaddr: U64
    pdh_len: U32
    pad0: U32
    session_uaddr: U64
    session_len: U32
    pad1: U32


@layout
class KvmSevReceiveUpdateData(Structure):
    """struct kvm_sev_receive_update_data."""

    hdr_uaddr: U64
    hdr_len: U32
    pad0: U32
    guest_uaddr: U64
    guest_len: U32
    pad1: U32
    trans_uaddr: U64
    trans_len: U32
    pad2: U32


@layout
class KvmSevSnpLaunchStart(Structure):
    """struct kvm_sev_snp_launch_start."""

    policy: U64
    gosvw: Annotated[Array[c_uint8], c_uint8 * 16]
    flags: U16
    pad0: Annotated[Array[c_uint8], c_uint8 * 6]
    pad1: Annotated[Array[c_uint64], c_uint64 * 4]


@layout
class KvmSevSnpLaunchUpdate(Structure):
    """struct kvm_sev_snp_launch_update."""

    gfn_start: U64
    uaddr: U64
    len: U64
    type: U8
    pad0: U8
    flags: U16
    pad1: U32
    pad2: Annotated[Array[c_uint64], c_uint64 * 4]


@layout
class KvmSevSnpLaunchFinish(Structure):
    """struct kvm_sev_snp_launch_finish."""

    id_block_uaddr: U64
    id_auth_uaddr: U64
    id_block_en: U8
    auth_key_en: U8
    vcek_disabled: U8
    host_data: Annotated[Array[c_uint8], c_uint8 * 32]
    pad0: Annotated[Array[c_uint8], c_uint8 * 3]
    flags: U16
    pad1: Annotated[Array[c_uint64], c_uint64 * 4]
