/* The floor of a merge: every input is read once, their weighted sum is rounded once to bf16 and written at its offset.

   It is no merge: there is no check, no header and no method. What takes longer than this is our own doing.

       floor THREADS SYNC OUT MODELS FILE...      the first shard of each model, then the second of each, and so on

   All files of a shard are laid out alike. Blocks are handed out in stored order. Inputs are read, not mapped: the page
   faults of a map take a quarter longer. */

#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#define BLOCK (1 << 18) /* elements: half a megabyte of bf16 */
#define MODELS 8

typedef struct {
    int in[MODELS];  /* descriptors */
    off_t at;        /* where the tensors begin in each */
    size_t count;    /* elements */
    off_t place;     /* in the output */
    size_t first;    /* number of its first block */
} Shard;

static Shard shards[64];
static int shard_count, models, out;
static size_t block_count;
static atomic_size_t next;

static void stop(const char *what) {
    perror(what);
    exit(1);
}

static void add(const uint16_t *restrict in, float *restrict sum, size_t n, float weight, int begin) {
    for (size_t i = 0; i < n; i++) {
        union { uint32_t bits; float value; } x = {(uint32_t)in[i] << 16};
        sum[i] = (begin ? 0.0f : sum[i]) + weight * x.value;
    }
}

static void narrow(const float *restrict sum, uint16_t *restrict to, size_t n) {
    for (size_t i = 0; i < n; i++) {
        union { float value; uint32_t bits; } x = {sum[i]};
        to[i] = (uint16_t)((x.bits + 0x7FFF + ((x.bits >> 16) & 1)) >> 16);
    }
}

static void *work(void *unused) {
    enum { PIECE = 4096 }; /* sums stay in the first cache */
    static _Thread_local float sum[PIECE];
    uint16_t *to = malloc(BLOCK * sizeof *to), *in[MODELS];
    for (int k = 0; k < models; k++) in[k] = malloc(BLOCK * sizeof *to);
    (void)unused;
    for (size_t block; (block = atomic_fetch_add(&next, 1)) < block_count;) {
        int s = shard_count - 1;
        while (shards[s].first > block) s--;
        size_t start = (block - shards[s].first) * BLOCK;
        size_t n = shards[s].count - start < BLOCK ? shards[s].count - start : BLOCK;
        for (int k = 0; k < models; k++) {
            ssize_t got = pread(shards[s].in[k], in[k], n * sizeof *to, shards[s].at + (off_t)(start * sizeof *to));
            if (got != (ssize_t)(n * sizeof *to)) stop("pread");
        }
        for (size_t piece = 0; piece < n; piece += PIECE) {
            size_t m = n - piece < PIECE ? n - piece : PIECE;
            for (int k = 0; k < models; k++) add(in[k] + piece, sum, m, 1.0f / models, k == 0);
            narrow(sum, to + piece, m);
        }
        const char *from = (const char *)to;
        off_t place = shards[s].place + (off_t)(start * sizeof *to);
        for (size_t left = n * sizeof *to; left;) {
            ssize_t wrote = pwrite(out, from, left, place);
            if (wrote <= 0) stop("pwrite");
            from += wrote, place += wrote, left -= (size_t)wrote;
        }
    }
    free(to);
    return NULL;
}

int main(int argc, char **argv) {
    if (argc < 6) return 2;
    int threads = atoi(argv[1]), sync = atoi(argv[2]);
    models = atoi(argv[4]);
    shard_count = (argc - 5) / models;
    if (models > MODELS || shard_count > 64 || threads > 64) return 2;
    off_t size = 0;
    for (int i = 0; i < shard_count * models; i++) {
        int file = open(argv[5 + i], O_RDONLY);
        struct stat about;
        if (file < 0 || fstat(file, &about)) stop(argv[5 + i]);
        uint64_t header;
        if (pread(file, &header, sizeof header, 0) != sizeof header) stop("pread");
        Shard *shard = &shards[i / models];
        shard->in[i % models] = file;
        shard->at = 8 + (off_t)header;
        shard->count = ((size_t)about.st_size - 8 - header) / 2;
        if (i % models == 0) {
            shard->place = size, shard->first = block_count;
            size += (off_t)(shard->count * 2), block_count += (shard->count + BLOCK - 1) / BLOCK;
        }
    }
    out = open(argv[3], O_CREAT | O_TRUNC | O_WRONLY, 0644);
    if (out < 0 || ftruncate(out, size)) stop(argv[3]);
    pthread_t ids[64];
    for (int i = 0; i < threads; i++)
        if (pthread_create(&ids[i], NULL, work, NULL)) stop("pthread_create");
    for (int i = 0; i < threads; i++) pthread_join(ids[i], NULL);
    if (sync && fsync(out)) stop("fsync");
    return close(out) ? 1 : 0;
}
