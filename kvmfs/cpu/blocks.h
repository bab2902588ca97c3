// SPDX-License-Identifier: GPL-2.0-or-later
// Part of native.c: the head of each translated block.
//
// Unicorn begins a block with a call of helper_check_exit_request (is the guest to be left?), which is a third and more of a
// small loop's time; QEMU looks at a word of env there. So does each block here as soon as it is translated: the call with its two
// arguments makes room for a comparison that jumps over a call of asked(), which goes on to the helper. A block that begins
// with anything else stays as it is.
#pragma once
#include "native.h"

enum { HEAD_SIZE = 17, ASKED_END = 11 };
enum { JMP_CACHE_SHIFT = 6, JMP_CACHE_PAGE = 0xfc0, JMP_CACHE_ADDR = 0x3f }; // tb_jmp_cache_hash_func()
typedef struct { u64 pc, cs_base; u32 flags; uint16_t size, icount; u32 cflags, trace; u8 *code; } Tb; // TranslationBlock

// In a block rbp is env. The return address stays in the block, where the helper finds the instruction by it.
__attribute__((naked)) static void asked(void) {
    __asm__("mov %c0(%%rbp), %%rdi\n\txor %%esi, %%esi\n\tjmp *%1" ::"i"(ENV_UC), "m"(p_check_exit));
}

// The helper reads what the comparison reads: mov UC_CPU(%rdi),%r8; mov ICOUNT_DECR from there,%eax.
static bool head_is_known(void) {
    const u8 *at = (const u8 *)p_check_exit;
    u32 cpu, word;
    memcpy(&cpu, at + 3, 4);
    memcpy(&word, at + 10, 4);
    return !memcmp(at, "\x4c\x8b\x87", 3) && cpu == UC_CPU && !memcmp(at + 7, "\x41\x8b\x80", 3) && word == ICOUNT_DECR - C_CPU;
}

static void shorten_head(Engine *e, u64 pc) {
    u64 hash = pc ^ pc >> JMP_CACHE_SHIFT, uc;
    const Tb *tb = (&F(Tb *, TB_JMP_CACHE))[(hash >> JMP_CACHE_SHIFT & JMP_CACHE_PAGE) | (hash & JMP_CACHE_ADDR)];
    if (!tb || tb->pc != pc) return;
    u8 *at = tb->code;
    int32_t helper;
    memcpy(&uc, at + 2, 8);
    memcpy(&helper, at + 13, 4);
    // movabs $uc,%rdi; xor %esi,%esi; call helper
    if (memcmp(at, "\x48\xbf", 2) || uc != (u64)e->uc || memcmp(at + 10, "\x33\xf6\xe8", 3)) return;
    int64_t away = (int64_t)((u64)asked - (u64)(at + ASKED_END));
    if (at + HEAD_SIZE + helper != (u8 *)p_check_exit || away != (int32_t)away) return;
    // cmpl $0,ICOUNT_DECR(%rbp); jns over it all; call asked; nop
    u8 head[HEAD_SIZE] = {0x83, 0x7d, (u8)ICOUNT_DECR, 0, 0x79, HEAD_SIZE - 6, 0xe8, 0, 0, 0, 0, 0x66, 0x0f, 0x1f, 0x44, 0, 0};
    memcpy(head + 7, &(int32_t){(int32_t)away}, 4);
    memcpy(at, head, HEAD_SIZE);
}
